"""A streamed dataset over several processes: the order of one process, for any number of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.streams.base import Batch
from data.streams.sources import build_stream
from data.tokenizers.train import train_tokenizer
from dsv2.parallel.mesh import ALONE, MeshDim
from tests.dist.pool import Pool

FILES = 6
LANES = 3  # on up to four ranks: one rank may have none


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for number in range(FILES):
        texts = [" ".join(rng.choice(words, rng.integers(3, 30))) for _ in range(5 + number)]
        (tmp_path / f"{number}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    train_tokenizer(words * 9, 290, tmp_path / "tokenizer.model")
    return DataConfig(
        source="hf_stream",
        dataset="json",
        data_files=[str(tmp_path / f"{number}.jsonl") for number in range(FILES)],
        val_split="other",
        tokenizer=str(tmp_path / "tokenizer.model"),
        lanes=LANES,
        shuffle_window=4,
        sequence_length=40,
        seed=3,
    )


def rows(batch: Batch) -> dict[int, list[int]]:
    """The labels of each sequence by its place."""
    return dict(zip(batch.sequence_ids.tolist(), batch.labels.tolist(), strict=True))


def without_dataset(state: dict[str, Any]) -> dict[str, Any]:
    """A state without the library's own part, which counts from where it was last loaded."""
    return state | {"lanes": {name: lane | {"dataset": None} for name, lane in state["lanes"].items()}}


def share_of(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """An unequal division of `total`: the first rank takes what the others leave."""
    each = total // (world_size + 1)
    first = total - each * (world_size - 1)
    return (0, first) if rank == 0 else (first + (rank - 1) * each, each)


def job(rank: int, world_size: int, config: DataConfig, plan: list[tuple[int, int]]) -> list[Any]:
    """Run on every rank: for each (ranks, steps) of the plan, go on from the state that the last one left.

    Returns this rank's sequences by place, and every state.
    """
    import torch.distributed as dist

    state = None
    got = {}
    states = []
    for ranks, steps in plan:
        group = dist.new_group(list(range(ranks)), backend="gloo") if ranks > 1 else None
        if rank < ranks:
            stream = build_stream(config, 290, MeshDim(group, group))
            if state is not None:
                stream.load_state_dict(state)
            for step in range(steps):
                total = 7 + step % 3
                got.update(rows(stream.take(total, *share_of(total, rank, ranks))))
            state = json.loads(json.dumps(stream.state_dict()))
        shared = [state]
        dist.broadcast_object_list(shared, src=0)
        if rank < ranks:
            assert shared[0] == state  # the same on every rank
        state = shared[0]
        states.append(state)
    return [got, states]


def test_any_number_of_ranks_gives_the_same_order(pools: dict[int, Pool], config: DataConfig) -> None:
    """Resumed from 2 to 4 to 1 to 3 ranks and on, past several epochs; states agree with one process, too."""
    plan = [(2, 3), (4, 5), (1, 2), (3, 7), (4, 0), (2, 2), (4, 3)]
    answers = pools[4].run("tests.dist.test_data_lanes:job", config=config, plan=plan)
    got = {place: labels for answer, _ in answers for place, labels in answer.items()}

    alone = build_stream(config, 290, ALONE)
    expected: dict[int, list[int]] = {}
    for (_, steps), state in zip(plan, answers[0][1], strict=True):
        total = sum(7 + step % 3 for step in range(steps))
        expected.update(rows(alone.take(total, 0, total)))
        assert without_dataset(state) == without_dataset(alone.state_dict())
    assert got == expected
    assert sum(len(answer) for answer, _ in answers) == len(expected) == alone.consumed
    assert min(lane["epoch"] for lane in alone.state_dict()["lanes"].values()) >= 1


def test_overlapping_and_missing_shares(pools: dict[int, Pool], config: DataConfig) -> None:
    answers = pools[2].run("tests.dist.test_data_lanes:overlap", config=config)
    alone = build_stream(config, 290, ALONE)
    alone.take(5, 0, 0)
    assert rows(alone.take(9, 2, 6)) == answers[0]
    alone = build_stream(config, 290, ALONE)
    assert rows(alone.take(14, 8, 6)) == answers[1]


def overlap(rank: int, world_size: int, config: DataConfig) -> dict[int, list[int]]:
    import torch.distributed as dist

    stream = build_stream(config, 290, MeshDim(dist.group.WORLD, dist.group.WORLD))
    stream.take(5, 0, 0)
    return rows(stream.take(9, 2 + rank, 6))
