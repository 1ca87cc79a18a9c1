"""train.py as a user runs it, on from another run, another layout or an export."""

import json
import shutil

import numpy as np
import pytest

from tests.dist.end_to_end import OFFLINE, PYTHON, STEPS, TORCHRUN, TWO, run, scalars, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # `weights` wants it so
    pytest.mark.timeout(1800),
]


def test_start_from_another_runs_checkpoint(command, begun, tmp_path):
    """resume=PATH of another run starts this one; run again, it goes on from its own."""
    source = begun / "checkpoints" / "step-00000008"
    output = run(command("other", OFFLINE, f"resume={source}", "stop_step=10"))
    assert "resumed after step 8" in output
    _, _, *overrides = command("other", f"resume={source}", "data.seed=9")
    found = run([PYTHON, "-m", "dsv2", "check", "1", *overrides], expect=2)  # before anything is started
    assert "error: the checkpoint is of other data: data.seed was 0, is 9; set" in found
    assert "resumed after step 10" in run(command("other", OFFLINE, f"resume={source}"))
    assert min(scalars(tmp_path / "other", "train/loss_lm")) == 9
    ids = [
        json.loads((path / "state.json").read_text())["run"]["wandb_id"]
        for path in (source, tmp_path / "other" / "checkpoints" / f"step-{STEPS:08d}")
    ]
    assert None not in ids
    assert ids[0] != ids[1], "another run is another W&B run"


def test_long_context_stage(command, begun, tmp_path):
    """YaRN at twice the length: weights and moments come along; steps, tokens and data start anew."""
    source = begun / "checkpoints" / "step-00000012"
    lr = 1e-4
    stage = ["experiment=long_context", "model=debug", "runtime=default", f"resume={source}"]
    stage += ["model.max_position_embeddings=64", "data.sequence_length=64", "optim.warmup_steps=0"]
    stage += ["model.rope_scaling.original_max_position_embeddings=32", "model.rope_scaling.factor=2"]
    stage += ["optim.total_tokens=4096", f"optim.lr={lr}", "optim.decay_at=[]", "checkpoint.every=1"]
    output = run(command("long", *stage, "stop_step=2"))
    assert f"started from the weights of {source}" in output
    before, after = weights(begun, 12), weights(tmp_path / "long", 1)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith("fp32/"):
            assert (tensor - before[name]).abs().max() < 10 * lr, f"{name}: one step away"
        if name.startswith("exp_avg_sq/"):
            assert (tensor >= 0.949 * before[name]).all(), f"{name}: 0.95 of it, and a new square"
    assert any((before[name] > 0).any() for name in before if name.startswith("exp_avg_sq/"))

    assert "resumed after step 2" in run(command("long", *stage))
    long = tmp_path / "long"
    assert list(scalars(long, "train/tokens").values()) == [512 * step for step in range(1, 9)]
    assert set(scalars(long, "train/lr").values()) == {lr}
    state = json.loads((long / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["adam_step"] == 12 + 8
    assert state["run"]["data"]["consumed"] == 8 * 8
    assert state["run"]["data"]["fingerprint"]["sequence_length"] == 64
    assert state["run"]["tokenizer"]["file"].endswith("/tokenizer.model")
    # Twice the length and other frequencies cost little: the loss is far from where pretraining began.
    short_losses, long_losses = scalars(begun, "train/loss_lm"), scalars(long, "train/loss_lm")
    assert abs(long_losses[1] - short_losses[12]) < 0.25 * (short_losses[1] - short_losses[12])

    text = run([PYTHON, "-m", "dsv2", "generate", str(long), "--prompt", "alpha beta", "--max-tokens", "8"])
    assert f"{long / 'checkpoints' / 'step-00000008'}, fp32, " in text
    assert "\nalpha beta" in text


def test_streamed_dataset_stops_resumes_and_is_exact(command, corpus, tmp_path):
    """A Hugging Face dataset, tokenised on the fly, validated on held-out documents of the same split."""
    rng = np.random.default_rng(1)
    for shard in range(3):
        rows = [" ".join(rng.choice(["alpha", "beta", "def", "(", ")"], 60)) for _ in range(150)]
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / f"{shard}.jsonl").write_text(lines)
    stream = [
        "data=hf_stream",
        "data.dataset=json",
        f"data.data_files=['{tmp_path}/*.jsonl']",
        "data.lanes=3",
    ]
    stream += [
        f"data.tokenizer={corpus / 'tokenizer.model'}",
        "data.val_split=train",
        "data.shuffle_window=8",
    ]
    stream += ["data.sequence_length=32", "data.path=''"]
    run(command("whole", *stream))
    run(command("stopped", *stream, "stop_step=7"))
    assert "resumed after step 7" in run(command("stopped", *stream, *TWO, launcher=TORCHRUN))
    whole, stopped = (
        scalars(tmp_path / "whole", "train/loss_lm"),
        scalars(tmp_path / "stopped", "train/loss_lm"),
    )
    assert {s: stopped[s] for s in range(1, 8)} == {s: whole[s] for s in range(1, 8)}
    np.testing.assert_allclose([stopped[s] for s in whole], list(whole.values()), rtol=2e-6)


@pytest.mark.full  # tests/dist/test_hf.py does the same without command lines
def test_export_and_start_from_it(command, tmp_path):
    """A run, exported in fp32: another run starts where that one ended, then goes on from its checkpoint."""
    run(command("one"))
    out = tmp_path / "exported"
    said = run([PYTHON, "-m", "dsv2", "export", str(tmp_path / "one"), str(out), "--dtype", "fp32"])
    assert f"wrote {out}" in said
    start = [f"init_from={out}", "optim.lr=1e-20", "optim.weight_decay=0", *TWO, "parallel.zero_stage=3"]
    output = run(command("two", *start, "stop_step=6", launcher=TORCHRUN))
    assert f"started from the weights of {out}" in output
    assert "note:" not in output
    end, begin = scalars(tmp_path / "one", "val/loss")[STEPS], scalars(tmp_path / "two", "val/loss")[6]
    assert begin == pytest.approx(end, rel=1e-6)
    shutil.rmtree(out)
    output = run(command("two", *start, launcher=TORCHRUN))
    path = tmp_path / "two" / "checkpoints" / "step-00000006"
    assert f"note: init_from={out} is ignored: the run continues from {path}" in output
    assert "resumed after step 6" in output
