"""A checkpoint from someone else: nothing in it is executed, and no flipped bit goes unnoticed."""

import json
import os
import pickle
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from data.config import DataConfig
from dsv2.checkpoint.files import FORMAT, check, checksum, state_text
from dsv2.checkpoint.reader import CheckpointReader
from dsv2.checkpoint.safe_reader import SafeReader
from dsv2.config.schema import Config
from dsv2.errors import UserError
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from tests.unit.helpers import save_checkpoint, tiny_config


class Command:
    """Unpickled, it runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    config = Config(model=tiny_config(), data=DataConfig(path="nowhere"))
    model = DeepseekV2(config.model)
    init_weights(model, 0.3, 0)
    return save_checkpoint(tmp_path / "step-00000007", model, config)


def replace_index(checkpoint: Path, index: object) -> None:
    """Plant an index whose size and checksum are right."""
    file = checkpoint / ".metadata"
    file.write_bytes(pickle.dumps(index))
    content = json.loads((checkpoint / "state.json").read_text())
    content["files"][file.name] = file.stat().st_size
    content["crc32"][file.name] = checksum(file)
    (checkpoint / "state.json").write_text(state_text(content))


def test_a_planted_command_does_not_run(checkpoint, tmp_path):
    marker = tmp_path / "marker"
    replace_index(checkpoint, Command(f"touch {marker}"))
    with pytest.raises(UserError, match=r"\.metadata names \w+.system, which no checkpoint contains"):
        CheckpointReader(checkpoint)
    assert not marker.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert marker.exists(), "the planted command works"


def test_an_index_cannot_name_a_file_outside(checkpoint):
    metadata = SafeReader(checkpoint).read_metadata()
    for part in metadata.storage_data.values():
        part.relative_path = "../other/__0_0.distcp"
    replace_index(checkpoint, metadata)
    with pytest.raises(UserError, match=r"names a file outside: \.\./other/__0_0\.distcp"):
        CheckpointReader(checkpoint)


@pytest.mark.parametrize("index", [[1, 2], Metadata(state_dict_metadata={})])
def test_an_index_of_another_kind_is_one_message(checkpoint, index):
    replace_index(checkpoint, index)
    with pytest.raises(UserError, match=r"\.metadata is not the index of a checkpoint"):
        CheckpointReader(checkpoint)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_flipped_bit_in_a_file_is_noticed_before_it_is_used(checkpoint, name):
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 4
    (checkpoint / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} does not hold what was written"):
        CheckpointReader(checkpoint)


def test_every_flipped_bit_of_the_state_is_refused_or_means_nothing(tmp_path):
    path = tmp_path / "step-00000003"
    path.mkdir()
    run = {"step": 3, "tokens": 768, "data": {"consumed": 24}, "wandb_id": "ab12"}
    content = {
        "format": FORMAT,
        "run": run,
        "adam_step": 3.0,
        "config": {"seed": 0},
        "files": {},
        "crc32": {},
    }
    text = state_text(content).encode()
    refused = 0
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / "state.json").write_bytes(flipped)
        try:
            assert check(path) == content
        except UserError:
            refused += 1
    assert refused > 0.8 * 8 * len(text), "only blanks may change"


def test_an_unknown_field_is_named(tmp_path):
    path = tmp_path / "step-00000003"
    path.mkdir()
    (path / "state.json").write_text(state_text({"format": FORMAT, "files": {}, "precision": "fp8"}))
    with pytest.raises(UserError, match=r"state\.json has the unknown field 'precision'; use a newer dsv2"):
        check(path)
