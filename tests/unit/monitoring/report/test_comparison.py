"""The page of several runs: one curve per run in each card, the options that differ, the throughput."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dsv2.config.compose import to_yaml
from dsv2.config.schema import Config
from dsv2.monitoring.panels import SECTIONS
from dsv2.monitoring.records import read_metrics
from dsv2.monitoring.report.layouts import COLUMNS, layout_cells
from dsv2.monitoring.report.run import read_run, thinned
from tests.unit.helpers import compose_config, run_verb
from tests.unit.monitoring.report.runs import (
    MARKUP,
    Parsed,
    in_a_browser,
    log_steps,
    needs_browser,
    tracker_of,
)

BALANCE = ("moe/aux_expert", "moe/add_expert")


def make_run(folder: Path, config: Config, state: str, steps: int = 100, **logged: object) -> Path:
    log_steps(folder, range(1, steps + 1), **logged)  # type: ignore[arg-type]
    (folder / "config.yaml").write_text(to_yaml(config))
    status = {"state": state, "step": steps, "total_steps": 100}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs of one name, the second still running and without balance losses; a third with maps only."""
    config = compose_config("name=twin")
    slow = replace(config, optim=replace(config.optim, lr=1e-5))
    named = replace(slow, name="third")
    first = make_run(tmp_path / "a" / "twin", config, "finished")
    second = make_run(tmp_path / "b" / "twin", slow, "running", 30, offset=0.5, leave_out=BALANCE)
    return [first, second, make_run(tmp_path / "third", named, "failed", 7, leave_out=("perf/mfu",))]


def compare(*folders: object) -> str:
    out = Path(str(folders[0])).parent / "comparison.html"
    assert run_verb("report", *folders, "--out", out) == 0
    return out.read_text()


def drawn_names() -> list[str]:
    charts = [chart for section in SECTIONS for chart in section.charts]
    return [name for chart in charts if not chart.is_map and not chart.is_family for name in chart.names]


def cells(text: str, section: str) -> list[list[str]]:
    """Return the texts of the section's table, row by row."""
    part = text[text.index(f'<section id="{section}">') :].partition("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", part)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def test_the_curves_are_the_runs_metrics(runs):
    data = json.loads(Parsed(compare(*runs)).data)
    assert data["steps"] == [0, 100]
    labels = [f"twin ({runs[0]})", f"twin ({runs[1]})", "third"]
    assert [run["label"] for run in data["runs"]] == labels
    for folder, run in zip(runs, data["runs"], strict=True):
        rows = read_metrics(folder)
        names = {name for row in rows for name in row} & set(drawn_names())
        assert set(run["series"]) == names
        assert len(names) > 15
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            assert run["series"][name] == [[s for s, _ in points], [v for _, v in points]], name


def test_each_metric_of_any_run_has_one_card(runs):
    parsed = Parsed(compare(*runs))
    cards = [a for _, a in parsed.elements if "data-kind" in a]
    assert {card["data-kind"] for card in cards} == {"runs"}
    names = [card["data-name"] for card in cards]
    assert sorted(map(str, names)) == sorted(drawn_names())
    data = json.loads(parsed.data)
    having = [[name in run["series"] for run in data["runs"]] for name in BALANCE]
    assert having == [[True, False, True]] * 2
    titles = ["different-options", "throughput-by-layout", "training", "balance", "performance"]
    assert list(parsed.sections) == [*titles, "final-values"]


def test_metrics_without_a_curve_are_listed(tmp_path, runs):
    for name, drop in (("one", 0.0), ("two", 0.0)):
        tracker = tracker_of(tmp_path / name)
        tracker.log(
            {"train/loss_total": 3.0, "moe/drop": drop, "moe/dead": 0.0 if name == "one" else 1.0}, step=1
        )
        tracker.close()
        shutil.copy(runs[0] / "config.yaml", tmp_path / name)
    parsed = Parsed(compare(tmp_path / "one", tmp_path / "two"))
    cards = [a["data-name"] for _, a in parsed.elements if "data-kind" in a]
    assert cards == ["train/loss_total", "moe/dead"], "0 in one run is a curve beside the other's"
    assert "0 in every run that has values: moe/drop" in parsed.sections["balance"]
    assert "No values in these runs: train/loss_lm, val/loss" in parsed.sections["training"]
    assert parsed.sections["different-options"].endswith("All options of these runs are equal.")


def test_options_that_differ_and_final_values(runs):
    text = compare(*runs)
    labels = [f"twin ({runs[0]})", f"twin ({runs[1]})", "third"]
    lr = str(compose_config().optim.lr)
    assert cells(text, "different-options") == [["option", *labels], ["optim.lr", lr, "1e-05", "1e-05"]]
    final = {row[0]: row[1:] for row in cells(text, "final-values")}
    assert final["train/loss_total"] == ["0.1", "0.8333", "1.429"]  # 10 / step + offset
    assert final["moe/aux_expert"] == ["0.1", "\N{EN DASH}", "2"]  # the third's last window ended at step 5
    states = re.findall(r'<span class="badge (\w+)">', text)
    assert states == ["finished", "running", "failed"]
    assert "30 of 100" in text


def log_speeds(folder: Path, speeds: list[float], ranks: int, first: int) -> None:
    tracker = tracker_of(folder)
    for step, speed in enumerate(speeds, start=first):
        values = {"perf/tok_s": speed * ranks, "perf/tok_s_gpu": speed, "perf/mem_gib": 1.0 + step / 100}
        tracker.log({**values, "perf/mfu": speed / 1e4}, step=step)
    tracker.close()


@pytest.mark.parametrize("sessions", [True, False])
def test_throughput_is_the_last_sessions_second_half(tmp_path, sessions):
    """4 steps on 2 ranks, then 5 on 8 ranks: of 100, 900, 3000, 5000, 4000 the last three count."""
    folder = tmp_path / "run"
    log_speeds(folder, [10.0, 20.0, 30.0, 40.0], ranks=2, first=1)
    log_speeds(folder, [100.0, 900.0, 3000.0, 5000.0, 4000.0], ranks=8, first=5)
    config = compose_config("parallel.expert_parallel_size=4", "parallel.zero_stage=2")
    (folder / "config.yaml").write_text(to_yaml(config))
    if sessions:
        lines = [
            {"step": 0, "commit": "aaa", "device": "cpu", "ranks": 2, "hosts": 1},
            {"step": 4, "commit": "bbb", "device": "NVIDIA H200", "ranks": 8, "hosts": 2},
        ]
        (folder / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = dict(zip(COLUMNS, layout_cells(read_run(folder)), strict=True))
    unknown = "\N{EN DASH}"
    assert row == {
        "commit": "bbb" if sessions else unknown,
        "device": "NVIDIA H200" if sessions else unknown,
        "ranks": "8",
        "hosts": "2" if sessions else unknown,
        "EP": "4",
        "DP": "8",
        "ZeRO": "2",
        "micro-batch": str(config.runtime.micro_batch_size),
        "batch": str(config.optim.batch_size),
        "tokens/s per GPU": "4.0K",
        "MFU": "40.0%",
        "peak memory, GiB": "1.09",
    }


def test_a_session_without_a_step_has_no_speed(tmp_path):
    folder = tmp_path / "run"
    log_speeds(folder, [10.0, 20.0], ranks=2, first=1)
    (folder / "config.yaml").write_text(to_yaml(compose_config()))
    line = {"step": 2, "commit": "bbb", "device": "cpu", "ranks": 4, "hosts": 1}
    (folder / "sessions.jsonl").write_text(json.dumps(line) + "\n")
    row = dict(zip(COLUMNS, layout_cells(read_run(folder)), strict=True))
    assert (row["ranks"], row["DP"], row["tokens/s per GPU"], row["MFU"]) == ("4", "4", *"\N{EN DASH}" * 2)


def test_a_run_without_speeds_has_no_ranks(tmp_path):
    folder = tmp_path / "run"
    tracker = tracker_of(folder)
    tracker.log({"train/loss_total": 1.0, "perf/tok_s": 0.0, "perf/tok_s_gpu": 0.0}, step=1)
    tracker.close()
    (folder / "config.yaml").write_text(to_yaml(compose_config()))
    row = dict(zip(COLUMNS, layout_cells(read_run(folder)), strict=True))
    assert (row["ranks"], row["DP"], row["tokens/s per GPU"]) == tuple("\N{EN DASH}" * 3)


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys, monkeypatch, runs):
    def message(*folders: object) -> str:
        assert run_verb("report", *folders, "--out", tmp_path / "out.html") == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert not (tmp_path / "out.html").exists()
        return printed.err

    first = runs[0]
    again = first.parent / ".." / "a" / "twin"
    assert message(first, runs[1], again) == (
        f"error: RUN_DIR={again}: is the same folder as {first}; give each run once\n"
    )
    assert (
        message(first, first)
        == f"error: RUN_DIR={first}: is the same folder as {first}; give each run once\n"
    )
    (tmp_path / "link").symlink_to(first)
    assert "is the same folder" in message(first, tmp_path / "link")
    gone = tmp_path / "gone"
    assert message(first, gone) == (
        f"error: {gone}/metrics.jsonl: no such file; is {gone} the directory of a run?\n"
    )
    gone.mkdir()
    (gone / "metrics.jsonl").touch()
    assert message(first, gone) == (
        f"error: {gone}/metrics.jsonl: the file is empty; the run has no finished step yet\n"
    )
    many = [tmp_path / str(index) for index in range(25)]
    assert message(*many) == "error: RUN_DIR: 25 folders are given; a page shows at most 24 runs\n"
    monkeypatch.chdir(tmp_path)
    assert run_verb("report", *runs) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_long_curves_share_the_page(tmp_path, runs):
    long = tmp_path / "long"
    tracker = tracker_of(long)
    for step in range(1, 1501):
        tracker.log({"train/loss_total": float(step * 7919 % 1009)}, step=step)
    tracker.close()
    shutil.copy(runs[0] / "config.yaml", long)
    data = json.loads(Parsed(compare(long, runs[1])).data)
    curve = read_run(long).curve("train/loss_total")
    few = thinned(curve, 1000)
    assert data["runs"][0]["series"]["train/loss_total"] == [few.steps, few.values]
    assert 500 < len(few.steps) <= 1000


def test_no_text_of_the_runs_becomes_markup(tmp_path, runs):
    clean = [tag for tag, _ in Parsed(compare(*runs)).elements]
    hostile = {"step": 7, f"train/{MARKUP}": 1.5}
    with (runs[2] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(hostile) + "\n")
    (runs[2] / "status.json").write_text(json.dumps({"state": MARKUP, "step": 7, "total_steps": 7}))
    config = compose_config()
    config.name = MARKUP
    config.optim.lr = 1e-5
    config.eval.sample_prompt = MARKUP
    (runs[2] / "config.yaml").write_text(to_yaml(config))
    line = {"step": 0, "commit": MARKUP, "device": MARKUP, "ranks": 1, "hosts": 1}
    (runs[2] / "sessions.jsonl").write_text(json.dumps(line) + "\n")
    moved = runs[2].rename(tmp_path / MARKUP.replace("/", ""))
    text = compare(runs[0], runs[1], moved)
    page = Parsed(text)
    rows = {"tr", "td"}  # the metric and the option are further rows of the tables
    assert [tag for tag, _ in page.elements if tag not in rows] == [tag for tag in clean if tag not in rows]
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert MARKUP in page.sections["throughput-by-layout"]
    assert f"eval.sample_prompt{MARKUP}" in page.sections["different-options"], "the others' are empty"
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}'; " in policy


@needs_browser
def test_a_browser_draws_each_run_in_its_own_colour(tmp_path, runs):
    """Ten runs: the ninth and the tenth have the first colours again, with dashes."""
    copies = [shutil.copytree(runs[0], tmp_path / f"copy{index}") for index in range(7)]
    text = compare(*runs, *copies)
    elements = in_a_browser(text, tmp_path).elements
    (body,) = (attributes for tag, attributes in elements if tag == "body")
    assert "data-error" not in body, body["data-error"]
    data = json.loads(Parsed(text).data)
    having = {name: sum(name in run["series"] for run in data["runs"]) for name in drawn_names()}
    assert int(body["data-drawn"] or 0) == len(having)
    curves = [a for tag, a in elements if tag == "path" and a["class"] == "curve"]
    assert len(curves) == sum(having.values())
    styles: dict[str | None, set[tuple[str | None, str | None]]] = {}
    for curve in curves:
        styles.setdefault(curve["data-name"], set()).add((curve["stroke"], curve.get("stroke-dasharray")))
    labels = [run["label"] for run in data["runs"]]
    assert set(styles) == set(labels)
    assert all(len(of_run) == 1 for of_run in styles.values()), "a run looks the same in every card"
    assert len({style for of_run in styles.values() for style in of_run}) == len(labels)
    assert styles[labels[0]] == {("var(--s0)", None)}
    assert styles[labels[9]] == {("var(--s1)", "5 3")}


# What a person does: draw over tokens, and look at the first curve's end.
VISITOR = """{
const box = document.getElementById("tokens");
box.checked = true;
box.dispatchEvent(new Event("change"));
const card = document.querySelector("[data-name='train/loss_lm'] svg"), place = card.getBoundingClientRect();
const end = (path) => Number(path.getAttribute("d").split(/[ML]/).pop().split(" ")[0]);
const drawn = [...card.querySelectorAll("[class=curve]")];
const shares = drawn.map((path) => (end(path) - 52) / (place.width - 62));
const at = { clientX: place.left + 52 + (place.width - 62) / 2, clientY: place.top + 50 };
card.dispatchEvent(new MouseEvent("mousemove", at));
const tip = document.getElementById("tip").innerText.split("\\n");
document.body.dataset.seen = JSON.stringify({ shares, tip });
}"""


@needs_browser
def test_curves_over_tokens(tmp_path, runs):
    """100 steps of 2048 tokens, and 30 steps of 4096: the second ends at 60 % of the axis."""
    path = runs[1] / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["train/tokens"] *= 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elements = in_a_browser(compare(*runs[:2]), tmp_path, VISITOR).elements
    (body,) = (attributes for tag, attributes in elements if tag == "body")
    assert "data-error" not in body, body["data-error"]
    seen = json.loads(body["data-seen"] or "{}")
    assert seen["shares"] == pytest.approx([1.0, 0.6], abs=2e-3)
    # At half of the axis: step 50 of the first, step 25 of the second.
    assert seen["tip"] == ["102.4K tokens", f"twin ({runs[0]}) 0.2", f"twin ({runs[1]}) 0.9"]
