"use strict";
// Draws a run's curves and maps into the cards that page.py has written, from the JSON in #data (see page_data in run.py):
// {steps: [before the first, last], series: {name: [steps, values]}, maps: [{step, name: rows}], first_layer, groups,
//  heat: {stops, colours}, exact: [names of curves that are not smoothed]}
// On the page of several runs (comparison.py), runs: [{label, series}] replaces series, and there are no maps. There,
// tokens may replace steps on the horizontal axis. A "step" below is then a number of tokens.

window.addEventListener("error", (event) => { document.body.dataset.error = event.message; });
const data = JSON.parse(document.getElementById("data").textContent);
const LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 24, HEIGHT = 210;
const EXACT = new Set(data.exact), TOKENS = "train/tokens";
const charts = []; // {draw(), mark(step or null)}
const tip = document.body.appendChild(element("div", { id: "tip", hidden: "" }));

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The page's policy forbids style attributes, but not this way to set a style.
function swatch(colour, dash) {
  const made = element("i");
  const [line, gap] = (dash ?? "1 0").split(" ").map(Number);
  made.style.background = dash
    ? `repeating-linear-gradient(90deg, ${colour} 0 ${line}px, transparent ${line}px ${line + gap}px)` : colour;
  return made;
}

function shape(parent, tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}

function format(value) {
  if (value === null || value === undefined) return "not a number";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "K"]])
    if (size >= unit) return trim(value / (letter === "K" ? 1e3 : unit)) + letter;
  return trim(value);
}
const trim = (value) => String(Number(value.toPrecision(4)));
const layerName = (index) => "L" + String(index).padStart(2, "0");

// Round numbers that cover [low, high], about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(i * step);
  return values;
}

function showTip(event, title, lines) {
  tip.replaceChildren(element("b", {}, title));
  for (const [mark, text] of lines) {
    const line = element("div");
    if (mark) line.append(mark);
    line.append(text);
    tip.append(line);
  }
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const right = event.clientX + 16 + box.width > window.innerWidth;
  tip.style.left = `${right ? event.clientX - 14 - box.width : event.clientX + 16}px`;
  tip.style.top = `${Math.min(event.clientY + 12, window.innerHeight - box.height - 6)}px`;
}

// Mark the step under the mouse in every chart over steps.
function markAll(step) {
  for (const chart of charts) chart.mark(step);
  if (step === null) tip.hidden = true;
}

// An SVG with the axis of steps, the same for every chart; x(step) is a step's horizontal position.
function stepAxis(box, height) {
  const [first, last] = axisEnds();
  const width = Math.max(box.clientWidth, 200), right = width - RIGHT, bottom = height - BOTTOM;
  const root = shape(box, "svg", { viewBox: `0 0 ${width} ${height}`, height });
  const span = Math.max(last - first, 1);
  const x = (step) => LEFT + ((step - first) / span) * (right - LEFT);
  for (const tick of ticks(first, first + span, Math.max(3, width / 110))) {
    if (tick !== Math.round(tick)) continue;
    shape(root, "text", { x: x(tick), y: height - 7, "text-anchor": "middle" }, format(tick));
  }
  shape(root, "line", { class: "axis", x1: LEFT, x2: right, y1: bottom, y2: bottom });
  const cursor = shape(root, "line", { class: "cursor", y1: TOP, y2: bottom, visibility: "hidden" });
  const mark = (step) => {
    const shown = step !== null && step >= first && step <= first + span;
    cursor.setAttribute("visibility", shown ? "visible" : "hidden");
    if (shown) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(step));
  };
  const stepAt = (event) => {
    const position = event.clientX - root.getBoundingClientRect().left;
    return first + Math.min(Math.max((position - LEFT) / (right - LEFT), 0), 1) * span;
  };
  root.addEventListener("mouseleave", () => markAll(null));
  return { root, x, mark, stepAt, right, bottom };
}

// Index of the step nearest to `step`; steps rise.
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

// Mean over a sliding window of about a thirtieth of the values; null stays a gap.
function smoothed(values) {
  const reach = Math.floor(values.length / 60);
  return values.map((value, index) => {
    if (value === null) return null;
    const part = values.slice(Math.max(0, index - reach), index + reach + 1).filter((v) => v !== null);
    return part.reduce((sum, v) => sum + v, 0) / part.length;
  });
}

function path(steps, values, x, y) {
  let text = "", pen = "M";
  values.forEach((value, index) => {
    if (value !== null) text += `${pen}${x(steps[index]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = value === null ? "M" : "L";
  });
  return text;
}

function bounds(lines) {
  let low = Infinity, high = -Infinity;
  for (const { values } of lines)
    for (const value of values)
      if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low === Infinity) return [0, 1];
  if (low >= 0 && low < high * 0.35) low = 0; // close to zero, so the axis starts there
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  return [low === 0 ? 0 : low - margin, high + margin];
}

// The lines of a card: a run's metrics, or a metric's runs. `dash` is undefined for a solid line.
const metricLines = (names) => names.map((name, index) => (
  { name, exact: EXACT.has(name), colour: `var(--s${index % 3})`, steps: data.series[name][0], values: data.series[name][1] }
));
const runStyle = (index) => ({ colour: `var(--s${index % 8})`, dash: [undefined, "5 3", "2 2"][Math.floor(index / 8)] });
const runLines = (name) => data.runs.flatMap(({ label, series }, index) => (name in series && hasPositions(series)
  ? [{ name: label, exact: EXACT.has(name), ...runStyle(index), steps: positions(series, series[name][0]),
    values: series[name][1] }] : []));

const isOverTokens = () => document.getElementById("tokens")?.checked ?? false;
const hasPositions = (series) => !isOverTokens() || TOKENS in series;
const axisEnds = () => (isOverTokens() ? [0, Math.max(...runLines(TOKENS).flatMap(({ steps }) => steps))] : data.steps);

// Where a run's steps are on the axis. Between two recorded steps, tokens grow evenly.
function positions(series, steps) {
  if (!isOverTokens()) return steps;
  const [known, tokens] = series[TOKENS];
  return steps.map((step) => {
    const here = nearest(known, step), there = known[here] < step ? here + 1 : here - 1;
    if (known[here] === step || there < 0 || there >= known.length) return tokens[here];
    return tokens[here] + (tokens[there] - tokens[here]) * (step - known[here]) / (known[there] - known[here]);
  });
}

function curves(card, linesNow) {
  let lines = linesNow();
  const legend = card.appendChild(element("div", { class: "legend" }));
  for (const { name, colour, dash, values } of lines)
    legend.append(element("span", {}, swatch(colour, dash), `${name} `,
      element("b", {}, format(values[values.length - 1]))));
  const box = card.appendChild(element("div"));
  const [low, high] = bounds(lines);
  const chart = { mark() {}, draw() {
    box.replaceChildren();
    lines = linesNow();
    const frame = stepAxis(box, HEIGHT);
    const y = (value) => frame.bottom - ((value - low) / (high - low)) * (frame.bottom - TOP);
    for (const tick of ticks(low, high, 4)) {
      shape(frame.root, "line", { class: "gridline", x1: LEFT, x2: frame.right, y1: y(tick), y2: y(tick) });
      shape(frame.root, "text", { x: LEFT - 7, y: y(tick) + 4, "text-anchor": "end" }, format(tick));
    }
    for (const { name, exact, colour, dash, steps, values } of lines) {
      const soft = document.getElementById("smooth").checked && values.length > 60 && !exact;
      const draw = (points, kind) => shape(frame.root, "path", {
        class: kind, stroke: colour, d: path(steps, points, frame.x, y), "data-name": name,
        ...(dash && kind === "curve" ? { "stroke-dasharray": dash } : {}) });
      draw(values, soft ? "curve faint" : "curve");
      if (soft) draw(smoothed(values), "curve");
      if (values.length < 40)
        values.forEach((value, index) => value === null || shape(frame.root, "circle", {
          cx: frame.x(steps[index]), cy: y(value), r: 2.6, fill: colour }));
    }
    chart.mark = frame.mark;
    frame.root.addEventListener("mousemove", (event) => {
      const step = frame.stepAt(event), longest = lines.reduce((a, b) => (b.steps.length > a.steps.length ? b : a));
      const shown = longest.steps[nearest(longest.steps, step)];
      markAll(shown);
      const title = isOverTokens() ? `${format(shown)} tokens` : `step ${shown}`;
      showTip(event, title, lines.map(({ name, colour, dash, steps, values }) => {
        const index = nearest(steps, shown);
        const where = steps[index] === shown ? "" : isOverTokens() ? ` (at ${format(steps[index])})` : ` (step ${steps[index]})`;
        return [swatch(colour, dash), `${name} ${format(values[index])}${where}`];
      }));
    });
  } };
  charts.push(chart);
}

// ---------------------------------------------------------------- colours of cells

function between(stops, colours, value) {
  if (value === null) return [0, 0, 0];
  let i = 1;
  while (i < stops.length - 1 && value > stops[i]) i++;
  const share = Math.min(Math.max((value - stops[i - 1]) / (stops[i] - stops[i - 1]), 0), 1);
  return colours[i].map((to, channel) => Math.round(colours[i - 1][channel] + share * (to - colours[i - 1][channel])));
}
const load = (value) => between(data.heat.stops, data.heat.colours, value);
const rising = (most) => (value) =>
  between([0, most / 2, most], [[247, 247, 247], [244, 165, 96], [178, 24, 43]], value);

function scale(legend, colour, most, low, high) {
  const bar = element("canvas", { width: 110, height: 1 });
  const pen = bar.getContext("2d");
  for (let i = 0; i < 110; i++) {
    pen.fillStyle = `rgb(${colour((i / 109) * most)})`;
    pen.fillRect(i, 0, 1, 1);
  }
  legend.append(element("span", {}, low, bar, high));
}

// The URL of a picture of rows of values; edges are the columns' borders in pixels.
function picture(rows, edges, colour) {
  const canvas = element("canvas", { width: Math.max(Math.round(edges[edges.length - 1]), 1), height: rows.length });
  const pen = canvas.getContext("2d");
  rows.forEach((row, r) => row.forEach((value, c) => {
    const from = Math.round(edges[c]);
    pen.fillStyle = `rgb(${colour(value)})`;
    pen.fillRect(from, r, Math.max(Math.round(edges[c + 1]) - from, 1), 1);
  }));
  return canvas.toDataURL();
}

function rowLabels(root, labels, rowHeight) {
  const every = Math.ceil(12 / rowHeight);
  labels.forEach((label, index) => index % every || shape(root, "text", {
    x: LEFT - 7, y: TOP + (index + 0.5) * rowHeight + 4, "text-anchor": "end" }, label));
}

// A chart of rows over steps: rows() returns [row][column], with one column per step in `steps`.
function strip(box, labels, steps, rows, colour, describe) {
  const chart = { mark() {}, draw() {
    box.replaceChildren();
    const rowHeight = Math.min(Math.max(HEIGHT / labels.length, 4), 44), values = rows();
    const begin = Math.max(data.steps[0], steps[0] - (steps.length > 1 ? steps[1] - steps[0] : steps[0]));
    const frame = stepAxis(box, TOP + rowHeight * labels.length + BOTTOM);
    const edges = [begin, ...steps].map((step) => frame.x(step) - frame.x(begin));
    shape(frame.root, "image", { x: frame.x(begin), y: TOP, width: edges[edges.length - 1], height: rowHeight * labels.length,
      preserveAspectRatio: "none", href: picture(values, edges, colour) });
    rowLabels(frame.root, labels, rowHeight);
    frame.root.append(frame.root.querySelector(".cursor"));
    chart.mark = frame.mark;
    frame.root.addEventListener("mousemove", (event) => {
      const after = steps.findIndex((step) => step >= frame.stepAt(event));
      const column = after < 0 ? steps.length - 1 : after;
      const position = (event.clientY - frame.root.getBoundingClientRect().top - TOP) / rowHeight;
      const row = Math.min(Math.max(Math.floor(position), 0), labels.length - 1);
      markAll(steps[column]);
      showTip(event, `step ${steps[column]}`, [[null, describe(labels[row], values[row][column])]]);
    });
  } };
  charts.push(chart);
  return chart;
}

function layers(card, prefix) {
  const names = Object.keys(data.series).filter((name) => name.startsWith(`${prefix}/L`)).sort();
  const rows = names.map((name) => data.series[name][1]);
  const most = Math.max(...rows.flat().map((value) => value ?? 0));
  const legend = card.appendChild(element("div", { class: "legend" }));
  scale(legend, rising(most), most, "0", format(most));
  strip(card.appendChild(element("div")), names.map((name) => name.split("/")[1]), data.series[names[0]][0],
    () => rows, rising(most), (label, value) => `${prefix}/${label} ${format(value)}`);
}

// ---------------------------------------------------------------- maps

const frameShown = { index: data.maps.length - 1, listeners: [] };

function map(card, name) {
  const frames = data.maps.filter((frame) => frame[name]);
  const shown = () => frames[Math.max(0, nearest(frames.map((f) => f.step), data.maps[frameShown.index].step))];
  const [height, width] = [frames[0][name].length, frames[0][name][0].length];
  const labels = frames[0][name].map((_, index) => layerName(data.first_layer + index));
  const column = name === "map/expert_load" ? "expert" : "group";
  const legend = card.appendChild(element("div", { class: "legend" }));
  scale(legend, load, 3, "0", "3 and more; white: balanced");
  const box = card.appendChild(element("div"));
  const update = { mark() {}, draw() {
    box.replaceChildren();
    const full = Math.max(box.clientWidth, 200), rowHeight = Math.min(Math.max(160 / height, 9), 34);
    const cell = (full - LEFT - RIGHT) / width, bottom = TOP + rowHeight * height;
    const root = shape(box, "svg", { viewBox: `0 0 ${full} ${bottom + BOTTOM}`, height: bottom + BOTTOM });
    const edges = Array.from({ length: width + 1 }, (_, index) => index);
    const image = shape(root, "image", { x: LEFT, y: TOP, width: cell * width, height: rowHeight * height,
      preserveAspectRatio: "none" });
    rowLabels(root, labels, rowHeight);
    const every = [1, 2, 4, 5, 8, 10, 16, 20, 32].find((n) => n * cell >= 26) ?? 64;
    for (let index = 0; index < width; index += every)
      shape(root, "text", { x: LEFT + (index + 0.5) * cell, y: bottom + 16, "text-anchor": "middle" }, index);
    if (column === "expert")
      for (let index = width / data.groups; index < width; index += width / data.groups)
        shape(root, "line", { class: "group", x1: LEFT + index * cell, x2: LEFT + index * cell, y1: TOP, y2: bottom });
    const hover = shape(root, "rect", { class: "hover", width: cell, height: rowHeight, visibility: "hidden" });
    root.addEventListener("mousemove", (event) => {
      const at = root.getBoundingClientRect();
      const c = Math.floor((event.clientX - at.left - LEFT) / cell), r = Math.floor((event.clientY - at.top - TOP) / rowHeight);
      const inside = c >= 0 && c < width && r >= 0 && r < height;
      hover.setAttribute("visibility", inside ? "visible" : "hidden");
      tip.hidden = !inside;
      if (!inside) return;
      hover.setAttribute("x", LEFT + c * cell);
      hover.setAttribute("y", TOP + r * rowHeight);
      showTip(event, `layer ${labels[r]}, ${column} ${c}`, [[null, `${format(shown()[name][r][c])} x the balanced load`]]);
    });
    root.addEventListener("mouseleave", () => { tip.hidden = true; hover.setAttribute("visibility", "hidden"); });
    update.refresh = () => image.setAttribute("href", picture(shown()[name], edges, load));
    update.refresh();
  } };
  charts.push(update);
  frameShown.listeners.push(() => update.refresh());
}

// One layer's experts over time.
function expertsOverTime(card) {
  const frames = data.maps.filter((frame) => frame["map/expert_load"]);
  const first = frames[0]["map/expert_load"];
  const choice = element("select", { "aria-label": "layer" },
    ...first.map((_, index) => element("option", { value: index }, `layer ${layerName(data.first_layer + index)}`)));
  card.querySelector("header").append(choice);
  const legend = card.appendChild(element("div", { class: "legend" }));
  scale(legend, load, 3, "0", "3 and more; white: balanced");
  const chart = strip(card.appendChild(element("div")), first[0].map((_, expert) => String(expert)),
    frames.map((frame) => frame.step),
    () => first[0].map((_, expert) => frames.map((frame) => frame["map/expert_load"][choice.value][expert])),
    load, (label, value) => `expert ${label}: ${format(value)} x the balanced load`);
  choice.addEventListener("change", () => chart.draw());
}

function slider() {
  const range = document.getElementById("when"), label = document.getElementById("when-step");
  const play = document.getElementById("play");
  if (!range) return;
  range.max = data.maps.length - 1;
  range.value = frameShown.index;
  const show = () => {
    frameShown.index = Number(range.value);
    label.textContent = `step ${data.maps[frameShown.index].step}`;
    for (const listener of frameShown.listeners) listener();
  };
  range.addEventListener("input", show);
  let timer = null;
  play.addEventListener("click", () => {
    if (timer === null && Number(range.value) === data.maps.length - 1) range.value = 0;
    const end = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
    if (timer !== null) return end();
    play.textContent = "Pause";
    timer = setInterval(() => {
      range.value = Number(range.value) + 1;
      show();
      if (Number(range.value) === data.maps.length - 1) end();
    }, 180);
    return show();
  });
  label.textContent = `step ${data.maps[frameShown.index].step}`;
}

const kinds = { curves: (card) => curves(card, () => metricLines(JSON.parse(card.dataset.names))),
  runs: (card) => curves(card, () => runLines(card.dataset.name)),
  layers: (card) => layers(card, card.dataset.prefix), map: (card) => map(card, card.dataset.name), time: expertsOverTime };
for (const card of document.querySelectorAll("[data-kind]")) kinds[card.dataset.kind](card);
for (const label of document.querySelectorAll("[data-run]")) {
  const { colour, dash } = runStyle(Number(label.dataset.run));
  label.prepend(swatch(colour, dash));
}
const drawAll = () => { for (const chart of charts) chart.draw(); };
drawAll();
slider();
for (const id of ["smooth", "tokens"]) document.getElementById(id)?.addEventListener("change", drawAll);
let pending = 0;
window.addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(drawAll, 120); });
document.body.dataset.drawn = charts.length;
