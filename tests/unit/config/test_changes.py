"""How two configurations differ, in the words that a resumed run prints."""

from dsv2.config.changes import differences
from dsv2.config.compose import to_plain
from dsv2.config.schema import Config


def test_what_differs_between_two_configurations():
    """By field; a field that an older version did not have had its default; where a run is does not count."""
    before, now = to_plain(Config(name="a")), to_plain(Config(name="b", stop_step=3))
    del before["runtime"]["kernels"], before["logging"]
    now["model"]["rope_scaling"] = {"factor": 40.0}
    now["optim"]["lr"], now["runtime"]["recompute"] = 5e-4, True
    assert differences(before, now) == [
        "model.rope_scaling.factor null -> 40.0",
        f"optim.lr {Config().optim.lr} -> 0.0005",
        "runtime.recompute false -> true",
    ]
    assert differences(now, now) == []


def test_a_changed_seed_is_said_to_do_nothing():
    before = to_plain(Config())
    assert differences(before, {**before, "seed": 7}) == [
        "seed 0 -> 7 (only the initial weights depend on it)"
    ]
