"""The report's page: the text of the file, and what a browser shows."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dsv2.monitoring.panels import SECTIONS
from dsv2.monitoring.pictures import HEAT_COLOURS, heat_map
from dsv2.monitoring.records import read_maps, read_metrics
from dsv2.monitoring.report import run as report
from tests.unit.helpers import REPO, run_verb
from tests.unit.monitoring.report.runs import (
    EXPERTS,
    LAYERS,
    Parsed,
    in_a_browser,
    log_steps,
    needs_browser,
    tracker_of,
    write_page,
)


def cards_by_kind() -> dict[str, int]:
    """Count the page's cards by the metrics' declarations."""
    charts = [chart for section in SECTIONS for chart in section.charts]
    return {
        "curves": sum(not chart.per_layer and not chart.is_map for chart in charts),
        "layers": sum(chart.per_layer for chart in charts),
        "map": sum(chart.is_map for chart in charts),
        "time": 1,
    }


def test_the_embedded_data_are_the_runs_metrics(run_dir):
    data = json.loads(Parsed(write_page(run_dir)).data)
    rows = read_metrics(run_dir)
    names = {name for row in rows for name in row} - {"step", "time"}
    assert set(data["series"]) == names
    assert len(names) > 40
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        assert data["series"][name] == [[s for s, _ in points], [v for _, v in points]], name
    assert data["maps"] == read_maps(run_dir)
    assert [frame["step"] for frame in data["maps"]] == list(range(10, 101, 10))
    assert (data["steps"], data["first_layer"], data["groups"]) == ([0, 100], 1, 4)
    # What followed the checkpoint that the second session began with is gone.
    assert data["series"]["train/loss_lm"][1][60] == 10 / 61 + 0.5


def test_the_page_needs_nothing_from_elsewhere(run_dir):
    text = write_page(run_dir)
    parsed = Parsed(text)
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "action", "background"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
    code = text.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace, never fetched
    for word in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttpRequest", "import(", "WebSocket"):
        assert word not in code


def test_every_section_exists_and_can_be_read_without_a_script(run_dir):
    parsed = Parsed(write_page(run_dir))
    titles = ["training", "balance", "routing-maps", "performance", "final-values", "environment"]
    titles.append("configuration")
    assert list(parsed.sections) == titles
    assert all("No values in this run" not in text for text in parsed.sections.values())
    final = parsed.sections["final-values"]
    assert all(name in final for name in ("val/bpb", "comm/a2a_ms", "L03"))
    assert "sample_prompt: </script><b>&" in parsed.sections["configuration"]  # escaped, hence text
    assert "config.0.yaml, of an earlier session" in parsed.sections["configuration"]
    environment = parsed.sections["environment"]
    assert "torch 2.11<b>" in environment  # escaped, hence text
    assert "commit</script><b>1234changed filesa<i>.pydiffdiff-2.patchcommandtrain.py name=<b>" in environment
    assert "machine n<b>processes 2; cpu EPYC; memory_gib 128.0; 2 x H200<b>, 139.8 GiB" in environment
    assert "sessions.jsonl also has the earlier sessions: 1." in environment
    assert "torch 2.10" not in environment
    kinds = [attributes["data-kind"] for _, attributes in parsed.elements if "data-kind" in attributes]
    want = cards_by_kind()
    assert want["curves"] >= 26, "a panel that exists today is missing"
    assert min(want["layers"], want["map"]) >= 3
    assert {kind: kinds.count(kind) for kind in kinds} == want


def test_missing_values_are_listed(tmp_path, run_dir):
    bare = tmp_path / "bare"
    log_steps(bare, range(1, 8), leave_out=tuple(n for s in SECTIONS[1:] for c in s.charts for n in c.names))
    shutil.copy(run_dir / "config.yaml", bare)
    parsed = Parsed(write_page(bare))
    assert "No values in this run: val/loss, val/bpb" in parsed.sections["training"]
    assert "No values in this run: moe/max_vio, moe/max_vio_max, vio/L*" in parsed.sections["balance"]
    assert "map/expert_load, map/dev_load, map/dev_recv" in parsed.sections["routing-maps"]
    assert json.loads(parsed.data)["maps"] == []


def test_not_a_number_is_null_and_zeros_are_a_line(tmp_path, run_dir):
    folder = tmp_path / "nan"
    tracker = tracker_of(folder)
    tracker.log({"train/loss_lm": 3.0, "moe/drop": 0.0, "drop/L01": 0.0, "moe/dead": 0.0}, step=1)
    tracker.log({"train/loss_lm": float("nan"), "moe/drop": 0.0, "drop/L01": 0.0, "moe/dead": 1.0}, step=2)
    tracker.close()
    shutil.copy(run_dir / "config.yaml", folder)
    parsed = Parsed(write_page(folder))
    assert json.loads(parsed.data)["series"]["train/loss_lm"] == [[1, 2], [3.0, None]]
    assert "0 all the time: moe/drop, drop/L*No" in parsed.sections["balance"]
    assert "not a number" in parsed.sections["final-values"]


def test_maps_beyond_the_last_step_are_left_out(run_dir):
    """A killed session's, before the resumed one has got as far."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:-12]))
    data = json.loads(Parsed(write_page(run_dir)).data)
    assert (data["steps"][1], data["maps"][-1]["step"]) == (88, 80)


def test_thinning_keeps_the_extremes():
    values: list[float | None] = [float(v) for v in np.random.default_rng(0).random(10_001)]
    values[5000], values[7000], values[0] = 9.0, -9.0, None
    curve = report.Curve(list(range(1, 10_002)), values)
    few = report.thinned(curve, 100)
    assert len(few.steps) <= 100
    assert dict(zip(few.steps, few.values, strict=True)).items() <= dict(zip(*curve, strict=True)).items()
    assert {5001, 7001} <= set(few.steps)
    assert few.steps == sorted(few.steps)
    assert report.thinned(curve, 20_000) is curve
    assert report.spread(list(range(1001)), 5) == [0, 250, 500, 750, 1000]


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys, run_dir):
    def message(*arguments: object) -> str:
        assert run_verb("report", *arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    where = f"is {tmp_path} the directory of a run?"
    assert message(tmp_path) == f"error: {tmp_path}/metrics.jsonl: no such file; {where}\n"
    (tmp_path / "metrics.jsonl").write_text("")
    assert message(tmp_path) == (
        f"error: {tmp_path}/metrics.jsonl: the file is empty; the run has no finished step yet\n"
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss_lm": 1.0}\n')
    assert message(tmp_path) == f"error: {tmp_path}/config.yaml: no such file; {where}\n"
    (tmp_path / "config.yaml").write_text("model: {hiden_size: 3}\n")
    assert "hiden_size" in message(tmp_path)
    out = tmp_path / "no" / "r.html"
    assert (
        message(run_dir, "--out", out)
        == f"error: --out {out}: cannot be written (No such file or directory)\n"
    )


def test_as_a_command(tmp_path, run_dir):
    done = subprocess.run(
        [sys.executable, "-m", "dsv2", "report", str(run_dir), "--out", str(tmp_path / "page.html")],
        cwd=REPO,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/page.html\n", "")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


# What a person does: look at a step of one curve, move the slider, look at a cell, look at another layer.
VISITOR = """{
const seen = { background: getComputedStyle(document.body).backgroundColor };
const at = (box, x, y) => new MouseEvent("mousemove", { clientX: box.left + x, clientY: box.top + y });
const read = () => document.getElementById("tip").innerText;
const loss = document.querySelector("[data-kind=curves] svg"), box = loss.getBoundingClientRect();
loss.dispatchEvent(at(box, 52 + (box.width - 62) * 0.4, 50)); // of the steps 0 to 100
seen.curve = read();
seen.cursors = document.querySelectorAll(".cursor[visibility=visible]").length;
const range = document.getElementById("when");
const picture = () => document.querySelector("[data-name='map/expert_load'] image").getAttribute("href");
const before = picture();
range.value = 2;
range.dispatchEvent(new Event("input"));
seen.step = document.getElementById("when-step").innerText;
seen.changed = picture() !== before;
const map = document.querySelector("[data-name='map/expert_load'] svg"), place = map.getBoundingClientRect();
const cell = (place.width - 62) / 16;
map.dispatchEvent(at(place, 52 + cell * 5.5, 8 + 1)); // expert 5 of the first layer
seen.cell = read();
const pixels = new Image();
pixels.onload = () => {
  const pen = document.createElement("canvas").getContext("2d");
  pen.drawImage(pixels, 0, 0);
  seen.colour = [...pen.getImageData(5, 0, 1, 1).data].slice(0, 3);
  seen.size = [pixels.width, pixels.height];
  document.body.dataset.seen = JSON.stringify(seen);
};
pixels.src = picture();
}"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_it(tmp_path, run_dir, dark):
    text = write_page(run_dir)
    elements = in_a_browser(text, tmp_path, VISITOR, dark=dark).elements
    (body,) = (attributes for tag, attributes in elements if tag == "body")
    assert "data-error" not in body, body["data-error"]
    # Every metric's curve has a path of as many points; each card a drawing; each map a picture.
    drawn = {a["data-name"]: a["d"] for tag, a in elements if tag == "path" and a["class"] == "curve"}
    data = json.loads(Parsed(text).data)
    scalars = {name for name in data["series"] if "/L" not in name}
    assert set(drawn) == scalars
    for name, d in drawn.items():
        assert len(re.findall(r"[ML][\d.]+ [\d.]+", d or "")) == len(data["series"][name][0]), name
    cards = [a for _, a in elements if "data-kind" in a]
    assert int(body["data-drawn"] or 0) == len(cards) == sum(tag == "svg" for tag, _ in elements)
    pictures = [a["href"] or "" for tag, a in elements if tag == "image"]
    want = cards_by_kind()
    assert len(pictures) == want["layers"] + want["map"] + want["time"]
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    # What the visitor saw.
    seen = json.loads(body["data-seen"] or "{}")
    assert seen["background"] == ("rgb(20, 23, 27)" if dark else "rgb(245, 246, 248)")
    assert seen["curve"].splitlines()[0] == "step 40"
    assert "train/loss_lm 0.25" in seen["curve"]
    assert seen["cursors"] == len(cards) - want["map"]  # every chart over steps
    assert (seen["step"], seen["changed"]) == ("step 30", True)
    load = data["maps"][2]["map/expert_load"]
    assert seen["cell"].splitlines() == [
        "layer L01, expert 5",
        f"{float(f'{load[0][5]:.4g}'):g} x the balanced load",
    ]
    assert seen["size"] == [EXPERTS, LAYERS]
    assert seen["colour"] == pytest.approx(heat_map(np.array(load))[0, 5 * 8].tolist(), abs=1)
    assert data["heat"]["colours"] == HEAT_COLOURS
