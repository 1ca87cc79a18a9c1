"""Which rank holds up a job that hangs. The reports of real ranks are in tests/dist/test_watchdog.py."""

import threading
import time

import pytest

from dsv2.parallel.hang import CHECKPOINT_THREAD, Report, culprits, report_of, verdict
from dsv2.parallel.progress import Part, Progress

AHEAD = Report(
    host="b",
    step=7,
    part="forward and backward",
    entries=30,
    collectives=90,
    seconds=20,
    is_waiting=True,
    line="dsv2/moe/layer.py:9 (forward)",
)


def rank(**changes: object) -> Report:
    return Report(**{**AHEAD.__dict__, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([AHEAD, rank(entries=29, part="data")], [1]),  # an earlier part
        ([AHEAD, AHEAD, rank(collectives=89)], [2]),  # the same part, on a GPU, where nobody blocks in torch
        ([rank(is_waiting=False), AHEAD, AHEAD], [0]),  # the same part, before DeepSpeed's collective
        ([rank(entries=29), rank(entries=29, is_waiting=False), AHEAD], [1]),  # rank 0 waits for rank 1
        ([rank(entries=29), AHEAD, rank(entries=29)], [0, 2]),
        ([AHEAD, AHEAD], []),
        ([AHEAD], [0]),
    ],
)
def test_the_culprit_has_come_least_far(reports, expected):
    assert culprits(dict(enumerate(reports))) == expected


HOSTS = {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        (
            {0: AHEAD, 1: rank(entries=29, part="data", line="data/streams/order.py:5 (take)"), 2: AHEAD},
            "rank 1 on b hung in step 7, data, at data/streams/order.py:5 (take): no progress within L=5 s",
        ),
        (
            {0: AHEAD, 1: AHEAD},
            "rank 2 on c hung and does not answer: no progress within L=5 s; "
            "the other ranks wait for it in step 7, forward and backward",
        ),
        (
            {0: AHEAD, 1: AHEAD, 2: AHEAD},
            "no single rank hangs: no progress within L=5 s, and every rank waits in step 7, "
            "forward and backward; check network and GPUs",
        ),
        (
            {0: rank(step=0, part="start", entries=0), 1: AHEAD, 2: AHEAD},
            "rank 0 on a hung in start, at dsv2/moe/layer.py:9 (forward): no progress within L=5 s",
        ),
    ],
)
def test_the_message_names_rank_host_step_part_and_line(reports, message):
    assert verdict(reports, HOSTS, "L=5 s") == message


def test_a_report_tells_where_the_main_thread_is():
    progress = Progress()
    progress.enter(Part.data, 3)
    progress.enter(Part.optimizer)
    found: list[Report] = []

    def report() -> None:
        now = progress.position.since + 12
        found.append(report_of(progress.position, host="a", collectives=4, now=now))

    thread = threading.Thread(target=report)
    thread.start()
    while not found:  # the thread must find this function on the main thread's stack
        time.sleep(0.01)
    thread.join()
    (got,) = found
    assert (got.host, got.step, got.part, got.entries, got.collectives) == ("a", 3, "optimizer", 2, 4)
    assert got.seconds == pytest.approx(12)
    assert not got.is_waiting
    assert got.line.startswith("tests/unit/parallel/test_hang.py:")
    assert got.line.endswith("(test_a_report_tells_where_the_main_thread_is)")
    assert Report.from_json(got.to_json()) == got


def test_during_a_save_the_report_is_of_the_thread_that_writes():
    done = threading.Event()
    begun = threading.Event()

    def write() -> None:
        begun.set()
        done.wait(60)

    thread = threading.Thread(target=write, name=CHECKPOINT_THREAD)
    thread.start()
    begun.wait(60)
    lines = {}
    for part in (Part.save, Part.data):
        progress = Progress()
        progress.enter(part, 3)
        report = report_of(progress.position, host="a", collectives=4, now=0)
        lines[part] = report.line.split()[-1]
    done.set()
    thread.join()
    assert lines[Part.save] == "(write)"
    assert lines[Part.data] == "(report_of)"
