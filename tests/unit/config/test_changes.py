"""How two configurations differ, in the words that a resumed run prints."""

from dsv2.config.changes import differences, differing
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


def test_the_options_that_differ_between_runs():
    """Values as in overrides; None where a run has no such option. Names and folders always differ."""
    plain = to_plain(Config(name="a", runs_dir="x"))
    scaled = to_plain(Config(name="b", runs_dir="y"))
    scaled["model"]["rope_scaling"] = {"factor": 40.0}
    scaled["optim"]["lr"], scaled["runtime"]["recompute"] = 5e-4, True
    lr = str(Config().optim.lr)
    assert differing([plain, plain, scaled]) == {
        "model.rope_scaling": ["null", "null", None],
        "optim.lr": [lr, lr, "0.0005"],
        "runtime.recompute": ["false", "false", "true"],
        "model.rope_scaling.factor": [None, None, "40.0"],
    }
    assert differing([plain, plain]) == {}
