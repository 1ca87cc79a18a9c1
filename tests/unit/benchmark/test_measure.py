"""dsv2/benchmark/measure.py: its refusals, the order of turns, the figures, and peers on a tiny model."""

import json
import math
import subprocess
import sys
from itertools import islice
from typing import Any

import pytest
import torch

from data.streams.sources import build_stream
from dsv2 import packages
from dsv2.benchmark import compare, peers
from dsv2.benchmark import measure as benchmark
from dsv2.benchmark.timing import balance_routing, random_tokens, row, stream_tokens, time_steps
from dsv2.config.schema import Config
from dsv2.errors import UserError
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from dsv2.parallel.mesh import ALONE, Mesh
from tests.unit.helpers import REPO, run_verb, tiny_config

TINY = ["data.sequence_length=16", "model.vocab_size=64", "model.num_hidden_layers=2", "optim.lr=1e-3"]


def configuration(*overrides: str) -> Config:
    return benchmark.configuration([*TINY, *overrides], 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--warmup", "-1"], "--warmup -1: must be at least 0"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (
            ["--out", "/nowhere/row.json"],
            "--out /nowhere/row.json: cannot be written (No such file or directory)",
        ),
        (
            ["--profile", "/nowhere/t.json"],
            "--profile /nowhere/t.json: cannot be written (No such file or directory)",
        ),
        (["model=nope"], "model=nope: there is no such option"),
        (["model.hiden_size=3"], "did you mean model.hidden_size?"),
        (["--against", "megatron"], "there is no peer 'megatron'; one of transformers, deepspeed_autoep"),
        (["--against", "transformers,transformers:2"], "transformers is given twice"),
        (["--against", "transformers:0"], "transformers:0 must be a peer and its micro-batch"),
        (["--against", "transformers:x"], "as transformers:6"),
        (["--against", "transformers", "optim.batch_size=8"], "optim.batch_size=8: a peer's step is one"),
        (["--against", "transformers", "runtime.recompute=true"], "peers do not recompute"),
        (["--against", "transformers", "model.attention=mha"], "attention=mha"),
        (
            ["--against", "transformers", "--balanced"],
            "--balanced: must be left out with --against; peers route as",
        ),
        (
            ["--against", "transformers", "data.path=prepared/mine"],
            "data.path=prepared/mine: peers train on random",
        ),
        (["runtime=gpu"], "there is no GPU on this machine"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(packages, "installed", lambda package: "5.17.0")
    assert run_verb("benchmark", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err


@pytest.mark.parametrize(
    ("peer", "installed", "said"),
    [
        ("transformers", {}, "-m pip install 'transformers>=5.0'"),
        ("transformers", {"transformers": "4.57.1"}, "transformers is 4.57.1, must be >=5.0"),
        ("deepspeed_autoep", {}, "-m pip install deepspeed==0.19.8 'transformers>=5.0'"),
        ("deepspeed_autoep", {"deepspeed": "0.20.0"}, "deepspeed is 0.20.0, must be ==0.19.8; "),
        ("deepspeed_autoep", {"deepspeed": "0.19.8"}, "transformers is not installed"),
        ("torchtitan", {}, " 'torch>=2.11' spmd_types==0.2.3 'tyro>=1.0' 'triton>=3.0' && "),
        ("torchtitan", {"torchtitan": "0.3.0", "torch": "2.10.0"}, "torch is 2.10.0, must be >=2.11; "),
        ("torchtitan", {"torchtitan": "0.3.0", "torch": "2.13.0"}, "spmd_types is not installed; "),
    ],
)
def test_a_peer_that_is_not_there_is_refused_before_anything_runs(capsys, monkeypatch, peer, installed, said):
    monkeypatch.setattr(packages, "installed", installed.get)
    monkeypatch.setattr(benchmark, "run_turn", lambda arguments: pytest.fail("something ran"))
    assert run_verb("benchmark", "--against", f"{peer}:2") == 2
    assert f"error: --against {peer}: " in (said_so := capsys.readouterr().err)
    assert said in said_so
    assert said_so.count("\n") == 1


def test_peers_are_one_process():
    with pytest.raises(UserError, match="torchrun=2: peers run as one process"):
        peers.check("transformers", configuration(), 2)


@pytest.mark.parametrize("name", peers.PEERS)
def test_an_adapter_says_what_it_needs_and_does(name):
    adapter = peers.adapter(name)
    assert adapter.ABOUT
    assert callable(adapter.build)
    assert all(version.startswith((">=", "==")) for version in adapter.REQUIRES.values())


def turns(ours: list[float], theirs: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of ours and of transformers, from their ms per step."""
    rows = iter([value for pair in zip(ours, theirs, strict=True) for value in pair])
    called = []

    def turn(name: str, number: int) -> dict[str, Any]:
        called.append((name, number))
        value = next(rows)
        if isinstance(value, str):
            return {"error": value}
        return {
            "step_ms": value,
            "tok_s_gpu": 1e6 / value,
            "tflops": 1.0,
            "mfu": None,
            "mem_gib": 3.0,
            "micro_batch": 4,
            "precision": "bf16/fp32",
        }

    found = compare.alternate(["dsv2", "transformers"], len(ours), turn)
    assert called == [(name, n) for n in range(len(ours)) for name in ("dsv2", "transformers")]
    return found


def test_turns_alternate_and_medians_are_over_rounds(capsys):
    rows = turns([100, 104, 90], [200, 210, 190])
    assert "round 3 of 3: transformers: 190.0 ms per step, 5263 tokens/s" in capsys.readouterr().out
    ours, theirs = (compare.summary(name, of) for name, of in rows.items())
    assert (ours["step_ms"], ours["spread"], ours["mem_gib"]) == (100, pytest.approx(0.14), 3.0)
    assert ours["version"] is None
    assert theirs["version"][0].isdigit()
    lines = compare.table([ours, theirs]).splitlines()
    assert lines[1].split() == ["dsv2", "bf16/fp32", "4", "100.0", "14.0%", "10000", "1", "-", "3.0", "1.000"]
    assert lines[2].split()[2:] == ["bf16/fp32", "4", "200.0", "10.0%", "5000", "1", "-", "3.0", "0.500"]


@pytest.mark.parametrize(("theirs", "sure"), [([200, 210, 190], True), ([100, 104, 101], False)])
def test_a_distance_within_the_spread_is_named(theirs, sure):
    rows = turns([100, 106, 98], theirs)
    text = compare.table([compare.summary(name, of) for name, of in rows.items()])
    assert ("note: transformers differs from dsv2 by less than the rounds' spread, 8.0%" in text) is not sure
    assert text.count("note:") == (0 if sure else 1)


def test_a_peer_that_fails_is_shown_and_the_others_go_on():
    rows = turns([100, 100], ["OutOfMemoryError: too large", "OutOfMemoryError: too large"])
    ours, theirs = (compare.summary(name, of) for name, of in rows.items())
    assert theirs["errors"] == ["OutOfMemoryError: too large"] * 2
    assert "OutOfMemoryError: too large" in compare.table([ours, theirs])


def test_a_turn_that_fails_says_why():
    (said,) = compare.run_turn(["model=nope"]).values()
    assert said.startswith("error: model=nope: there is no such option")


@pytest.mark.parametrize(
    ("last_lines", "said"),
    [
        (
            "torch._dynamo.exc.Unsupported: no super()\n  Hint: try\n    raise SpmdTypeError(\n",
            "torch._dynamo.exc",
        ),
        ("[rank0]: torch.OutOfMemoryError: too large\n[W1125 NCCL] not destroyed\n", "[rank0]: torch.OutOfM"),
        ("  assert sizes\nAssertionError\nexiting now\n", "AssertionError"),
        ("RuntimeError: first\n\nValueError: second\n", "ValueError: second"),
        ("Killed by the system\n", "Killed by the system"),
        ("", ""),
    ],
)
def test_what_a_turn_died_of(last_lines, said):
    found = compare.what_failed(last_lines)
    assert found.startswith(said)
    assert bool(found) is bool(said)


def test_timing_counts_steps_after_warmup_and_one_accounting_of_flops():
    config = configuration("runtime.micro_batch_size=2", "optim.batch_size=4")
    seen = []

    def step(micro_batches: list[torch.Tensor]) -> float:
        seen.append(micro_batches)
        return float(len(seen))

    timing = time_steps(step, random_tokens(config, 0, 1), torch.device("cpu"), steps=3, warmup=2)
    assert [[list(t.shape) for t in batch] for batch in seen] == [[[2, 17], [2, 17]]] * 5
    assert not torch.equal(seen[0][0], seen[1][0])
    assert (len(timing.seconds), timing.loss, timing.peak_gib) == (3, 5.0, None)
    figures = row(config, torch.device("cpu"), timing._replace(seconds=[1.0, 2.0, 9.0]), 1, "")
    assert (figures["step_ms"], figures["tok_s_gpu"]) == (2000, 32)
    again = next(random_tokens(config, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(again, seen[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_learns_what_it_is_shown(dtype):
    config = configuration("model.initializer_range=0.006")
    work = peers.Work(config.model, config.optim, 4, 16, 0, torch.device("cpu"), dtype)
    adapter = peers.adapter("transformers")
    model = adapter.build_model(work)
    assert model.config._experts_implementation == "grouped_mm"
    assert model.config._attn_implementation == "sdpa"
    assert {p.dtype for p in model.parameters()} == {dtype}
    step, batch = adapter.build(work), next(random_tokens(config, 0, 1))
    losses = [step(batch) for _ in range(4)]
    assert losses[0] == pytest.approx(math.log(64), abs=0.1)  # the loss of the next token, not of this one
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3


def test_a_comparison_of_all_that_is_here(tmp_path, capsys):
    out = tmp_path / "row.json"
    arguments = [
        "--against",
        "transformers,deepspeed_autoep",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--warmup",
        "1",
    ]
    assert run_verb("benchmark", *arguments, "--out", str(out), *TINY) == 0
    printed, told = capsys.readouterr()
    sizes = "dsv2 4 x 16, transformers 4 x 16, deepspeed_autoep 4 x 16 tokens each"
    assert told.startswith(f"1 round of 1 + 2 steps on cpu: {sizes}\n")
    assert "routed experts" in printed  # our parts
    assert "speed" in printed
    ours, transformers, autoep = json.loads(out.read_text())["contenders"]
    assert [found["name"] for found in (ours, transformers, autoep)] == ["dsv2", *peers.PEERS[:2]]
    assert ours["rounds"][0]["parts"]["routed experts"]["ms"] > 0
    # The same weights, tokens, clipping and AdamW, so the same loss after three steps.
    losses = [found["rounds"][0]["loss"] for found in (transformers, autoep)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert ours["rounds"][0]["loss"] == pytest.approx(losses[0], abs=0.2)


def test_the_configuration_is_one_micro_batch_a_rank_unless_given():
    assert benchmark.configuration(["runtime.micro_batch_size=2"], 3).optim.batch_size == 6
    assert benchmark.configuration(["optim.batch_size=8"], 1).optim.batch_size == 8
    many = [
        "optim.batch_size=512",
        "data.sequence_length=4096",
    ]  # more tokens than the default run has
    assert benchmark.configuration(many, 1).optim.batch_size == 512
    assert configuration().data.sequence_length == 16


def test_balanced_routing_gives_every_expert_as_many_tokens():
    model = DeepseekV2(tiny_config())
    init_weights(model, 0.3, seed=0)
    balance_routing(model)
    ids = torch.randint(31, (2, 4, 12), generator=torch.Generator().manual_seed(0))
    out = model(ids[0], ids[1], torch.arange(4))
    out.loss.backward()
    assert (out.stats.load_E == out.stats.load_E[0, 0]).all()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in model.decoder_layers()[1:])


def test_tokens_of_a_prepared_folder(tmp_path):
    """What training would read: labels are the next ids, and steps follow one another."""
    texts, data = tmp_path / "texts", tmp_path / "data"
    texts.mkdir()
    for index in range(20):
        (texts / f"{index}.txt").write_text(f"def f{index}(x): return x + {index}\n" * 20)
    prepare = [sys.executable, "-m", "data.prepare", "files", str(texts), "--out", str(data)]
    subprocess.run([*prepare, "--vocab-size", "290", "--quiet"], cwd=REPO, check=True, timeout=120)
    config = configuration("model.vocab_size=300", f"data.path={data}", "runtime.micro_batch_size=2")
    mesh = Mesh(torch.device("cpu"))
    first, second = islice(stream_tokens(config, mesh), 2)
    stream = build_stream(config.data, 300, ALONE)
    batch = stream.take(2, 0, 2)
    assert [t.shape for t in first] == [(2, 17)]
    assert torch.equal(first[0][:, :-1], batch.input_ids)
    assert torch.equal(first[0][:, 1:], batch.labels)
    assert torch.equal(second[0][:, :-1], stream.take(2, 0, 2).input_ids)
