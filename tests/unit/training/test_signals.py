"""A signal is answered at once, with what the run will still do."""

import os
import signal

import pytest
import torch

from dsv2.parallel.mesh import Mesh
from dsv2.parallel.progress import Part
from dsv2.training.signals import StopSignals


@pytest.mark.parametrize(
    ("part", "answer"),
    [
        (Part.data, "finishing step 7, then saving\n"),
        (Part.compute, "finishing step 7, then saving\n"),
        (Part.evaluation, "finishing the evaluation after step 7, then saving\n"),
        (Part.save, "finishing step 8, then saving\n"),
    ],
)
def test_the_first_signal_is_answered_once(part, answer, capfd, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    mesh = Mesh(torch.device("cpu"))
    mesh.progress.enter(part, 7)
    with capfd.disabled(), StopSignals(mesh) as stop:
        assert not stop.requested()
    with StopSignals(mesh) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
    assert capfd.readouterr().out == answer


def test_one_process_per_machine_answers(capfd, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with StopSignals(Mesh(torch.device("cpu"))) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
    assert capfd.readouterr().out == ""
