"""Alerts by value: from which step on, how often, and what they say."""

import math

import pytest

from dsv2.config.schema import LoggingConfig
from dsv2.monitoring.alerts import Alerts

EXPERTS = 40


def routing(values: list[float | None], name: str, **config) -> dict[int, str]:
    """step -> the alert's text, for a metric that is missing (None) between the ends of windows."""
    alerts = Alerts(LoggingConfig(**config), EXPERTS)
    found = {}
    for step, value in enumerate(values, start=1):
        metrics = {"train/loss_total": 2.0} | ({} if value is None else {name: value})
        for alert in alerts.check(step, metrics):
            assert alert.title == "routing collapse"
            found[step] = alert.text
    return found


def spikes(losses: list[float], **config) -> dict[int, str]:
    alerts = Alerts(LoggingConfig(**config), EXPERTS)
    found = {}
    for step, loss in enumerate(losses, start=1):
        for alert in alerts.check(step, {"train/loss_total": loss}):
            assert alert.title == "loss spike"
            found[step] = alert.text
    return found


def test_max_violation_over_its_threshold_for_so_many_windows():
    values = [None, 4.1, None, 4.2, None, 4.3, None, 4.4, 4.5]
    assert routing(values, "moe/max_vio_max", alert_max_vio=4.0, alert_windows=3) == {
        6: "step 6: moe/max_vio_max is 4.30, over 4.00 for 3 windows in a row"
    }


def test_dead_experts_over_their_share():
    """A tenth of 40 experts is 4, and 4 is not over it."""
    values = [5, 4, 5, 6]
    assert routing(values, "moe/dead", alert_dead=0.1, alert_windows=2) == {
        4: "step 4: moe/dead is 6, over 4 for 2 windows in a row"
    }


def test_one_window_below_ends_the_episode():
    values = [9, 9, 9, 9, 1, 9, 9, 9]
    assert list(routing(values, "moe/max_vio_max", alert_max_vio=4.0, alert_windows=2)) == [2, 7]


def test_both_kinds_of_collapse_are_counted_apart():
    alerts = Alerts(LoggingConfig(alert_max_vio=4.0, alert_dead=0.1, alert_windows=2), EXPERTS)
    rows = [{"moe/max_vio_max": 5.0, "moe/dead": 0.0}, {"moe/max_vio_max": 0.0, "moe/dead": 9.0}]
    assert [alerts.check(step, {"train/loss_total": 1.0, **row}) for step, row in enumerate(rows)] == [[], []]
    both = {"train/loss_total": 1.0, "moe/max_vio_max": 5.0, "moe/dead": 9.0}
    assert [a.text.split(" is ")[0] for a in alerts.check(3, both)] == ["step 3: moe/dead"]
    assert [a.text.split(" is ")[0] for a in alerts.check(4, both)] == ["step 4: moe/max_vio_max"]


@pytest.mark.parametrize("off", [0.0, None])
def test_a_threshold_of_0_or_null_is_no_alert(off):
    assert routing([1e9] * 20, "moe/max_vio_max", alert_max_vio=off) == {}
    assert routing([40] * 20, "moe/dead", alert_dead=off) == {}
    assert spikes(NOISE + [1e9] * 20, alert_spike=off) == {}


NOISE = [3.0, 5.0] * 20  # mean 4, standard deviation 1


def test_a_spike_must_last_and_comes_once():
    assert spikes([*NOISE, *[11.0] * 5, 4.0, 4.0], alert_spike=6.0, alert_spike_steps=3) == {
        43: "step 43: train/loss_total is 11.000, over 10.000 for 3 steps in a row; "
        "its running mean is 4.000, its standard deviation 1.000"
    }
    assert spikes([*NOISE, 11.0, 11.0, 4.0, 11.0, 11.0], alert_spike=6.0, alert_spike_steps=3) == {}
    assert spikes([*NOISE, *[9.9] * 9], alert_spike=6.0, alert_spike_steps=3) == {}, "not over 10"


def test_the_next_spike_is_another_episode():
    spike = [20.0, 20.0]
    assert list(spikes([*NOISE, *spike, 4.0, *spike], alert_spike=6.0, alert_spike_steps=2)) == [42, 45]


def test_a_loss_that_falls_at_first_is_no_spike():
    assert spikes([3 + 8 * math.exp(-step / 30) for step in range(1000)]) == {}


def test_the_first_steps_raise_no_alert():
    assert spikes([4.0, 4.0, 400.0, 4.0, 9.0] * 5, alert_spike_steps=1) == {}


def test_a_new_level_is_learned_after_a_horizon():
    """Measured at the level the loss has stayed at, a second jump is seen again."""
    up = [n + 20 for n in NOISE * 5]
    found = spikes([*NOISE, *up, *[40.0] * 9], alert_spike=6.0, alert_spike_steps=3)
    assert list(found) == [43, 243]
    assert "running mean is 24.000" in found[243]


def test_a_slow_rank_is_named_with_its_host_if_it_is_the_same_one_in_every_window():
    alerts = Alerts(LoggingConfig(alert_slow_rank=1.5, alert_windows=3), EXPERTS, hosts=["a", "b"])
    ranks = [0, 1, 0, 1, 1, 1, 1]
    found = {}
    for step, rank in enumerate(ranks, start=1):
        for alert in alerts.check(step, {"ranks/slow": 1.8, "ranks/slowest": float(rank)}):
            found[step] = alert
    assert found == {
        6: ("slow rank", "step 6: ranks/slow is 1.80, over 1.50 for 3 windows in a row: rank 1 on b")
    }
