"""Reading a checkpoint's weights; tests/dist/test_checkpoint.py reads what runs really save."""

import json
import weakref
from pathlib import Path

import pytest
import torch

from data.config import DataConfig
from dsv2.checkpoint.files import checksum, find_checkpoint
from dsv2.checkpoint.reader import CheckpointReader
from dsv2.config.schema import Config
from dsv2.errors import UserError
from dsv2.inference.model import load_model
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from tests.unit.helpers import YARN, save_checkpoint, tiny_config


def make(path: Path, seed: int = 0, **changes) -> tuple[Path, DeepseekV2]:
    config = Config(model=tiny_config(**changes), data=DataConfig(path="nowhere"))
    model = DeepseekV2(config.model)
    init_weights(model, 0.3, seed)
    return save_checkpoint(path, model, config), model


def edit(path: Path, section: str, **fields) -> None:
    content = json.loads((path / "state.json").read_text())
    content["config"][section] |= fields
    (path / "state.json").write_text(json.dumps(content))


def test_the_model_that_was_saved(tmp_path):
    path, saved = make(tmp_path / "step-00000007", rope_scaling=YARN)
    model = load_model(path)
    assert model.config == saved.config
    assert not model.training
    for (name, p), q in zip(saved.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_run_means_its_newest_whole_checkpoint(tmp_path):
    older, _ = make(tmp_path / "run" / "checkpoints" / "step-00000003")
    newer, _ = make(tmp_path / "run" / "checkpoints" / "step-00000012")
    assert find_checkpoint(tmp_path / "run") == newer
    assert find_checkpoint(older) == older
    (newer / "__0_0.distcp").unlink()
    assert find_checkpoint(tmp_path / "run") == older
    (older / "state.json").unlink()
    with pytest.raises(UserError, match=r"run .*run: no checkpoint in .*checkpoints is whole"):
        find_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_that_is_no_checkpoint(tmp_path, name):
    (tmp_path / "empty").mkdir()
    for use in (find_checkpoint, load_model):
        with pytest.raises(UserError, match=rf"checkpoint .*{name}: (there is no such folder|no state.json)"):
            use(tmp_path / name)


def test_an_older_versions_configuration_takes_the_defaults(tmp_path):
    path, saved = make(tmp_path / "step-00000007")
    content = json.loads((path / "state.json").read_text())
    del content["config"]["model"]["rope_scaling"], content["config"]["eval"]
    (path / "state.json").write_text(json.dumps(content))
    assert load_model(path).config == saved.config


def test_a_newer_versions_configuration_is_refused(tmp_path):
    path, _ = make(tmp_path / "step-00000007")
    edit(path, "model", bias=True)
    with pytest.raises(UserError, match=r"saved configuration does not fit this version: .*bias"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, r"nothing under fp32/model.layers.3.\S+ instead of"),
        ({"vocab_size": 32}, r"620 numbers under fp32/model.embed_tokens.weight instead of 640 numbers"),
    ],
)
def test_weights_of_another_model(tmp_path, change, message):
    path, _ = make(tmp_path / "step-00000007")
    edit(path, "model", **change)
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_damaged_bytes(tmp_path):
    path, _ = make(tmp_path / "step-00000007")
    data = path / "__0_0.distcp"
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(UserError, match=r"checkpoint .*: __0_0.distcp does not hold what was written"):
        load_model(path)
    content = json.loads((path / "state.json").read_text())
    content["crc32"][data.name] = checksum(data)  # someone wrote such a file
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"checkpoint .*: fp32/\S+ cannot be read .*; use an older one"):
        load_model(path)


def test_memory_holds_the_model_and_one_tensor(tmp_path, monkeypatch):
    """Every tensor that was read before the last one is gone when the next is asked for."""
    path, _ = make(tmp_path / "step-00000007")
    read: list[weakref.ref] = []
    plain = CheckpointReader.tensor

    def watched(self: CheckpointReader, name: str, numel: int) -> torch.Tensor:
        assert not any(earlier() is not None for earlier in read), name
        array = plain(self, name, numel).numpy().copy()
        read.append(weakref.ref(array))
        return torch.from_numpy(array)  # whose memory lives as long as any view of it

    monkeypatch.setattr(CheckpointReader, "tensor", watched)
    load_model(path)
    assert len(read) > 20
