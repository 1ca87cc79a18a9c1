"""What a run that is out of memory says."""

import pytest
import torch

from dsv2.errors import UserError
from dsv2.training.out_of_memory import memory_explained
from tests.unit.helpers import compose_config

CONFIG = compose_config("data=local", "data.path=nowhere", "runtime.micro_batch_size=3")


def test_torchs_error_on_the_cpu_says_itself_what_was_asked_for():
    with pytest.raises(RuntimeError, match=str(2**62)) as caught, memory_explained(CONFIG):
        torch.empty(2**60)
    assert not isinstance(caught.value, UserError)


def test_the_message_names_the_rank_and_the_sizes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"on rank 1 \(CPU\), with runtime") as e, memory_explained(CONFIG):
        raise MemoryError
    assert "runtime.micro_batch_size=3 of data.sequence_length=" in str(e.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
                "which 1.20 GiB is free. Including non-PyTorch memory, this process has 77.90 GiB in use."
            ),
            r"on rank 0 \(GPU: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of "
            r"79.11 GiB of which 1.20 GiB is free\), with",
        ),
        (torch.OutOfMemoryError("other words"), r"on rank 0 \(GPU: other words\), with"),
        (MemoryError(), r"on rank 0 \(CPU\), with"),
    ],
)
def test_others_words(error, message, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=message), memory_explained(CONFIG):
        raise error


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), memory_explained(CONFIG):
        raise RuntimeError("shapes differ")
