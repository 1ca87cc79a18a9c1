"""What holds for every source: one global order of sequences, whatever the shares, stops and resumes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import UserError
from data.streams.sources import check_config, check_resumed, source_of
from data.tokenizers.load import load_tokenizer
from tests.unit.data.streams.helpers import (
    COUNT,
    LANES,
    WINDOW,
    build,
    check,
    local,
    sequences_of,
    stream_order,
    streamed,
)
from tests.unit.helpers import REPO


def comparable(state: dict) -> dict:
    """A state without the library's own part, which counts from where it was last loaded."""
    lanes = {name: lane | {"dataset": None} for name, lane in state.get("lanes", {}).items()}
    return state | {"lanes": lanes}


@pytest.mark.parametrize("step", [1, 3, 7, 10])
def test_shares_and_steps_change_nothing(config: DataConfig, step: int) -> None:
    """Any division of the order into takes, and of each take into shares, gives the same sequences."""
    expected = stream_order(build(config), COUNT)
    streams = [build(config) for _ in range(2)]
    got: list[list[int]] = []
    ids: list[int] = []
    for total in [step] * (COUNT // step):
        cut = total // 3
        for stream, start, count in zip(streams, (0, cut), (cut, total - cut), strict=True):
            batch = stream.take(total, start, count)
            got += sequences_of(batch)
            ids += batch.sequence_ids.tolist()
        assert [stream.consumed for stream in streams] == [len(ids)] * 2
    assert ids == list(range(len(ids)))
    assert got == expected[: len(got)]


def test_resume_at_every_point(config: DataConfig) -> None:
    """Save, load into a fresh stream, save again at once, load that and go on: inside and between windows."""
    expected = stream_order(build(config), COUNT)
    stream = build(config)
    for place in range(2 * LANES * WINDOW + 2):
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = build(config)
        resumed.load_state_dict(state)
        assert resumed.consumed == place
        assert json.loads(json.dumps(resumed.state_dict())) == state
        again = build(config)
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        batch = again.take(20, 0, 20)
        assert sequences_of(batch) == expected[place : place + 20]
        assert batch.sequence_ids.tolist() == list(range(place, place + 20)), "so who is exempt"
        stream.take(1, 0, 0)  # advances without handing anything out


def test_chain_of_resumes(config: DataConfig) -> None:
    """Resumes on resumes, across the ends of windows and epochs; the last state is that of one long run."""
    expected = stream_order(build(config), COUNT)
    whole = build(config)
    stream = build(config)
    for start, end in pairwise([0, 1, 2, 13, 14, 50, 77, 78, COUNT]):
        resumed = build(config)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert stream_order(resumed, end - start) == expected[start:end]
        stream = resumed
    whole.take(COUNT, 0, 0)
    assert comparable(stream.state_dict()) == comparable(whole.state_dict())


def test_loading_turns_a_used_stream_back(config: DataConfig) -> None:
    expected = stream_order(build(config), 40)
    stream = build(config)
    stream.take(7, 0, 7)
    state = stream.state_dict()
    assert stream_order(stream, 33) == expected[7:40]
    stream.load_state_dict(state)
    assert stream_order(stream, 33) == expected[7:40]


OTHER = {"seed": 6, "sequence_length": 11, "lanes": 2, "shuffle_window": 5, "split": "x", "text_column": "x"}


@pytest.mark.parametrize(
    ("make", "field"),
    [(local, "seed"), (local, "sequence_length"), *((streamed, field) for field in OTHER)],
)
def test_state_of_other_data(folder: Path, make: Callable[..., DataConfig], field: str) -> None:
    """Found by the stream, and before there is one."""
    config = make(folder)
    stream = build(config)
    state = stream.state_dict()
    check_resumed(config, state, asdict(config))
    state["fingerprint"] = {**state["fingerprint"], field: OTHER[field]}
    was, now = re.escape(repr(OTHER[field])), re.escape(repr(getattr(config, field)))
    for find in (stream.load_state_dict, partial(check_resumed, config, saved=asdict(config))):
        with pytest.raises(UserError, match=rf"other data: data\.{field} was {was}, is {now};"):
            find(state)


@pytest.mark.parametrize(("total", "start", "count"), [(4, 3, 2), (4, -1, 2), (4, 0, -1)])
def test_share_outside_the_step(config: DataConfig, total: int, start: int, count: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        build(config).take(total, start, count)


def test_what_goes_with_the_data(folder: Path) -> None:
    for config in (local(folder), streamed(folder)):
        tokenizer = source_of(config).tokenizer(config)
        assert tokenizer.sha256 == load_tokenizer(folder / "tokenizer.model").sha256
        np.testing.assert_array_equal(source_of(config).token_bytes(config), tokenizer.token_bytes())
    assert source_of(streamed(folder)).unigram_nats(streamed(folder)) is None
    unigram = source_of(local(folder)).unigram_nats(local(folder))
    assert unigram is not None
    assert 1 < unigram < np.log(300)


def test_check_data_accepts(folder: Path) -> None:
    check(local(folder), 300)
    check(streamed(folder), 300)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "tape"}, r"data\.source=tape: must be one of stdlib, local, hf_stream"),
        ({"lanes": 0}, r"data\.lanes=0: must be at least 1"),
        ({"seed": -1}, r"data\.seed=-1: must be at least 0"),
        ({"dataset": None}, r"data\.dataset: must be given for data=hf_stream"),
        ({"tokenizer": ""}, r"data\.tokenizer: must be given for data=hf_stream"),
    ],
)
def test_mistakes_in_the_configuration(folder: Path, changes: dict, message: str) -> None:
    check_config(streamed(folder))
    with pytest.raises(UserError, match=message):
        check_config(streamed(folder, **changes))


def test_the_configuration_is_checked_without_torch() -> None:
    code = "import sys, data.streams.sources; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
