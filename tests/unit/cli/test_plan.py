"""The planner's command line: what it prints, what it refuses, and that it needs no torch."""

import os
import re
import subprocess
import sys

import pytest

from dsv2.cli.plan import Plan, load, read
from dsv2.errors import UserError
from dsv2.formats import short
from dsv2.parallel.gpus import GPUS
from dsv2.planner.search import Machines
from tests.unit.helpers import REPO, cpu_seconds_of_children


def plan(*words: str) -> None:
    verb = Plan()
    assert verb.run(verb.parse(list(words))) == 0


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        plan(*words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=lite"], "gpus: must be given, as gpus=NUMBER of all GPUs"),
        (
            ["experiment=lite", "gpus=8", "gpu=x100"],
            "gpu=x100: there is no such GPU; one of a100, h100, h800, h200, b200",
        ),
        (
            ["experiment=lite", "gpus=8", "ep=3"],
            "parallel.expert_parallel_size=3: must divide the number of processes, 8: one of 1, 2, 4, 8; "
            "or start another number (NPROC=N launch/local.sh, torchrun --nproc_per_node=N; a plan: gpus=N)",
        ),
        (["gpus=8", "gpux=h100"], "gpux=h100: there is no such field; did you mean gpu?"),
        (["gpus=8", "x"], "x: must be written as NAME=VALUE"),
        (["gpus=8", "zer=1"], "zer=1: there is no such field; did you mean zero?"),
        (
            ["gpus=8", "parallel.zero_stag=1"],
            "parallel.zero_stag=1: there is no such field; did you mean parallel.zero_stage?",
        ),
        (["gpus=8", "+optim.lrr=1"], "+optim.lrr=1: there is no such field; did you mean optim.lr?"),
        (["gpus=8", "batch_size=7"], "batch_size=7: there is no such field; did you mean optim.batch_size?"),
        (
            ["gpus=8", "model=lit"],
            "model=lit: there is no such option; did you mean lite? "
            "one of debug, lite, lite_slice, small, v2, v2_slice",
        ),
        (
            ["gpus=8", "experiment=nope"],
            "experiment=nope: there is no such option; one of lite, long_context, quickstart, "
            "study/attention, study/balance, study/granularity, v2",
        ),
        (["gpus=8", "zero=4", "experiment=lite"], "parallel.zero_stage=4: must be 0, 1, 2 or 3"),
        (
            ["gpus=8", "zero=0", "experiment=lite"],
            "parallel.zero_stage=0: must be 1, 2 or 3 with runtime.precision=bf16, for fp32 master weights; "
            "or use runtime.precision=fp32",
        ),
        (
            ["gpus=512", "experiment=v2"],
            "optim.batch_size_start=2304: must be a multiple of 512 = runtime.micro_batch_size=1 x 512 "
            "processes",
        ),
        (["gpus=0"], "gpus=0: must be a number of at least 1"),
        (["gpus=-8"], "gpus=-8: must be a number of at least 1"),
        (["gpus=eight"], "gpus=eight: must be a number of at least 1"),
        (["gpus=8", "gpus_per_node=0"], "gpus_per_node=0: must be a number of at least 1"),
        (["gpus=12"], "gpus=12: must be at most gpus_per_node=8, or a multiple of it"),
        (["gpus=8", "mfu=25"], "mfu=25: must be a share of the peak, such as 0.3"),
        (["gpus=8", "mfu=nan"], "mfu=nan: must be a share of the peak, such as 0.3"),
        (["gpus=8", "mfu=0"], "mfu=0: must be a share of the peak, such as 0.3"),
        (["gpus"], "gpus: must be written as NAME=VALUE"),
    ],
)
def test_refusals(words, message):
    assert refusal(*words) == message


def test_a_wrong_type_is_explained():
    assert refusal("gpus=8", "optim.lr=fast").startswith("optim.lr=fast: ")
    assert refusal("gpus=8", "ep=many").startswith("parallel.expert_parallel_size=many: ")


def test_words_and_overrides():
    machines, overrides = read(["gpus=16", "gpu=H200", "mfu=0.3", "experiment=v2", "ep=8", "zero=3"])
    assert machines == (16, GPUS["h200"], 8, 0.3)
    assert overrides == ["experiment=v2", "parallel.expert_parallel_size=8", "parallel.zero_stage=3"]


@pytest.mark.parametrize("data", [["experiment=v2"], ["data=hf_stream"], ["data=stdlib"], ["data.path=x"]])
def test_no_data_is_needed(data):
    load(
        [
            "parallel.expert_parallel_size=1",
            "optim.batch_size=2304",
            "optim.total_tokens=1_000_000_000_000",
            *data,
        ],
        Machines(8, GPUS["h100"], 8, None),
    )


def test_kernels_of_packages_and_gpus_that_are_elsewhere(capsys):
    """fused_cute needs neither here, but the GPU planned for must be one it is made for."""
    words = ["experiment=lite", "gpus=8", "runtime.kernels=fused_cute"]
    plan(*words, "gpu=h200")
    assert ", fused_cute kernels" in capsys.readouterr().out.splitlines()[0]
    assert refusal(*words, "gpu=b200") == (
        "runtime.kernels=fused_cute: needs a Hopper GPU (H100, H800, H200), not B200; or use fused or "
        "reference"
    )
    assert refusal("experiment=lite", "gpus=8", "gpu=a100") == (
        "runtime.kernels=fused: cuDNN's attention takes heads of at most 128 on A100, not 192; use reference"
    )
    plan("experiment=lite", "gpus=8", "gpu=a100", "runtime.kernels=reference")
    plan("experiment=lite", "gpus=8", "gpu=a100", "model.qk_nope_head_dim=64")


def test_a_plan_that_fits(capsys):
    plan("experiment=lite", "gpus=8", "runtime.recompute=true")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "lite: 8 x H100, expert parallel 8, ZeRO-1, bf16, micro-batch 1 x 4096 tokens, activations "
        "recomputed, fused kernels"
    )
    assert lines[1].startswith("parameters  15.7B, 2.66B active per token; a rank computes with 3.11B ")
    assert "it fits" in lines
    # 2, 4, 4 / 8 and 8 / 8 bytes a parameter of the 1.31 B that all ranks hold, and so on.
    dense, experts = 1.310e9, 1.799e9
    for name, size in {
        "weights": 2 * (dense + experts),
        "gradients": 4 * (dense + experts),
        "fp32 weights": 4 * (dense / 8 + experts),
        "optimizer states": 8 * (dense / 8 + experts),
    }.items():
        value = next(line.split()[-1] for line in lines if line.startswith(f"  {name} "))
        assert float(value) == pytest.approx(size / 2**30, rel=2e-3), name


def test_a_plan_that_does_not_fit_says_what_would(capsys):
    plan("experiment=v2", "gpus=128")
    text = capsys.readouterr().out
    verdict = next(line for line in text.splitlines() if line.startswith("it does NOT fit"))
    words = verdict.split(" fits: ")[1].split(" (")[0].split()
    plan("experiment=v2", "gpus=128", *words)
    assert "\nit fits\n" in capsys.readouterr().out


def test_the_published_cost(capsys):
    plan("experiment=v2", "gpus=128", "gpu=h800", "mfu=0.25")
    text = capsys.readouterr().out
    assert "MFU 25.0%" in text
    assert "174.5K GPU-hours per trillion tokens" in text, "172.8K in the paper, at about 25 %"


def test_search_lists_words_that_can_be_given_back(capsys):
    plan("experiment=lite", "gpus=8", "--search")
    lines = capsys.readouterr().out.splitlines()
    assert "layouts fit, fastest first; 20 are shown" in lines[0]
    rows = [line.split() for line in lines[2:]]
    assert len(rows) == 20
    peak, *_, days = rows[0][:4]
    plan("experiment=lite", "gpus=8", *rows[0][4:])
    text = capsys.readouterr().out
    assert "\nit fits\n" in text
    assert f" {peak}" in text
    assert f" {days} days for 5.70T tokens" in text


def test_search_finds_nothing(capsys):
    plan("experiment=v2", "gpus=8", "--search")
    found, advice = capsys.readouterr().out.split("; ")
    assert found == "v2 on 8 x H100: 0 layouts fit into 71.1 GiB"
    assert advice.startswith("the smallest change that fits: gpus=64 ep=16 zero=3 runtime.recompute=true (")


def test_search_does_not_ask_for_the_layout_it_looks_for(capsys):
    """The recipe's own, 8 ranks sharing the experts, cannot be on 6 GPUs."""
    plan("experiment=lite", "gpus=6", "--search")
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("lite on 6 x H100: ")
    assert {re.search(r"ep=(\d)", row)[1] for row in rows} <= {"1", "2"}


@pytest.mark.parametrize(
    ("number", "text"), [(8.1e12, "8.10T"), (37_748_736, "37.7M"), (999, "999"), (21.376e9, "21.4B")]
)
def test_short_numbers(number, text):
    assert short(number) == text


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dsv2", "plan", *words],
        cwd=REPO,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("words", [["--help"], ["experiment=v2", "gpus=128"]])
def test_quick_and_without_torch(words):
    before = cpu_seconds_of_children()
    done = command(*words)
    used = cpu_seconds_of_children() - before
    assert used < 4
    assert done.returncode == 0, done.stderr
    modules = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in modules
    # The data sources, which check their fields, import numpy.
    assert not modules & {"torch", "deepspeed", "datasets", "pyarrow", "wandb", "transformers"}


def test_a_mistake_is_one_line_and_exit_code_2():
    done = command("gpus=8", "gpu=x100")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout) == (2, "")
    assert lines == ["error: gpu=x100: there is no such GPU; one of a100, h100, h800, h200, b200"]
