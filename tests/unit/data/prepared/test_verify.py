"""A prepared folder whose bytes have changed, or that comes from someone else."""

import errno
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data.corpora.jsonl import JsonlCorpus
from data.errors import Unreadable, UserError
from data.prepare.command import main
from data.prepare.corpus import prepare
from data.prepare.progress import SEAL as PROGRESS_SEAL
from data.prepare.progress import open_progress
from data.prepare.settings import Settings
from data.prepared.manifest import SEAL, load_manifest
from data.prepared.packing import open_split
from data.prepared.shards import ShardWriter, read_tokens
from data.prepared.verify import read_token_bytes, verify
from data.sealed import seal, unseal
from data.streams.folder import LocalSource
from dsv2.config.schema import DataConfig
from tests.unit.corpus import VOCAB, arguments, documents

LENGTH = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with several shards of several record batches."""
    folder = tmp_path_factory.mktemp("prepared")
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    prepare(JsonlCorpus((str(file),)), folder / "out", Settings(VOCAB, shard_mb=0.01), quiet=True)
    return folder / "out"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def flip_ids(file: Path) -> None:
    """Change one id; the file still is a shard of the right size."""
    content = bytearray(file.read_bytes())
    ids = read_tokens(file)[-1].tobytes()
    content[content.index(ids) + len(ids) // 2] ^= 1
    file.write_bytes(content)


def rewrite(file: Path, field: str, **changes: Any) -> None:
    """Plant fields under a right checksum."""
    content = unseal(json.loads(file.read_text()), field)
    file.write_text(json.dumps(seal(content | changes, field)))


def check(folder: Path) -> None:
    LocalSource().check(DataConfig(source="local", path=str(folder), sequence_length=LENGTH), VOCAB, 1)


def test_the_checksums_are_of_every_record_batch(prepared):
    manifest = load_manifest(prepared)
    assert len(manifest.train.shards) > 2
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        arrays = read_tokens(prepared / shard.file)
        assert shard.crc32 == tuple(zlib.crc32(ids.tobytes()) for ids in arrays)
    assert verify(prepared) == manifest
    check(prepared)


def test_a_changed_id_is_refused_before_it_is_used(folder):
    shards = load_manifest(folder).train.shards
    flip_ids(folder / shards[1].file)
    check(folder)  # a start compares sizes: a folder may hold terabytes
    packed = open_split(folder, "train", LENGTH, VOCAB)
    first = (shards[0].tokens - 1) // LENGTH  # sequences that end in the first shard
    packed.take(np.arange(first))
    with pytest.raises(UserError, match=rf"data.path={folder}: {shards[1].file} does not hold what was writ"):
        packed.take(np.array([first + 1]))
    with pytest.raises(UserError, match=rf"{shards[1].file} does not hold what was written"):
        verify(folder)


def test_a_piece_is_verified_once(folder, monkeypatch):
    packed = open_split(folder, "train", LENGTH, VOCAB)
    everything = np.arange(len(packed))
    before = packed.take(everything)
    monkeypatch.setattr(zlib, "crc32", None)
    assert (packed.take(everything) == before).all()


def test_the_same_command_reads_a_finished_folder_again(tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    command = arguments(texts, tmp_path / "out")
    assert main(command) == main(command) == 0
    assert "Its files hold what was written" in capsys.readouterr().out
    flip_ids(tmp_path / "out" / load_manifest(tmp_path / "out").validation.shards[0].file)
    assert main(command) == 2
    assert ".arrow does not hold what was written" in capsys.readouterr().err


def test_an_interrupted_preparation_notices_a_shard_that_has_changed(tmp_path, monkeypatch):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    out = tmp_path / "out"
    finish = ShardWriter.finish

    def interrupted(writer: ShardWriter) -> Any:
        if (out / "train-00001.arrow").exists():
            raise KeyboardInterrupt
        return finish(writer)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", interrupted)
        assert main(arguments(texts, out)) == 130
    flip_ids(out / "train-00000.arrow")
    with pytest.raises(UserError, match=r"train-00000.arrow does not hold what was written"):
        prepare(JsonlCorpus((str(texts),)), out, Settings(VOCAB, shard_mb=0.01), quiet=True)


def test_a_folder_of_an_earlier_version_has_no_checksums(folder):
    content = json.loads((folder / "manifest.json").read_text())
    del content[SEAL], content["token_bytes_crc32"]
    for split in ("train", "validation"):
        for shard in content[split]["shards"]:
            del shard["crc32"]
    (folder / "manifest.json").write_text(json.dumps(content))
    check(folder)
    assert verify(folder).train.shards[0].crc32 == ()
    assert len(open_split(folder, "train", LENGTH, VOCAB).take(np.arange(3))) == 3


def test_every_changed_byte_of_the_manifest_is_noticed(folder):
    path = folder / "manifest.json"
    manifest = load_manifest(folder)
    text = path.read_bytes()
    refused = 0
    for place in range(0, len(text), 7):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        try:
            assert load_manifest(folder) == manifest
        except UserError:
            refused += 1
    assert refused > 0.7 * len(text) / 7, "only blanks may change"


OUTSIDE = ["../victim.txt", "/etc/passwd", "notes.txt", "", ".", "train-00000.arrow/..", "train-0.arrow", 3]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_of_its_folder_alone(folder, name):
    content = json.loads((folder / "manifest.json").read_text())
    shards = [content["train"]["shards"][0] | {"file": name}]
    rewrite(folder / "manifest.json", SEAL, train=content["train"] | {"shards": shards})
    with pytest.raises(UserError, match="is no shard of this folder"):
        load_manifest(folder)


def test_a_manifest_names_a_tokenizer_of_its_folder_alone(folder):
    rewrite(folder / "manifest.json", SEAL, tokenizer_file="../tokenizer.model")
    with pytest.raises(UserError, match=r"'../tokenizer.model' is no file of this folder"):
        load_manifest(folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_progress_file_cannot_delete_a_file_outside(tmp_path, name):
    """With other arguments, the files of an unfinished preparation are removed."""
    out = tmp_path / "out"
    out.mkdir()
    kept = [tmp_path / "victim.txt", out / "notes.txt"]
    for file in kept:
        file.write_text("precious")
    shard = {"file": name, "documents": 1, "tokens": 3, "text_bytes": 1, "file_bytes": 1, "crc32": [1]}
    part = {"documents": 1, "digest": "", "train": shard, "validation": None}
    progress = {"request": {"kind": "files"}, "tokenizer_sha256": None, "parts": [part]}
    for content in (progress, seal(progress, PROGRESS_SEAL)):
        (out / "progress.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"progress.json is not a progress file"):
            open_progress(out, {"kind": "jsonl"})
    assert all(file.read_text() == "precious" for file in kept)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"request": 3, "parts": []}'])
def test_a_strange_progress_file_is_one_message(tmp_path, text):
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(UserError, match=r"progress.json is not a progress file; choose another folder"):
        open_progress(tmp_path, {"kind": "jsonl"})


def test_fields_of_a_newer_version_are_named(folder):
    content = json.loads((folder / "manifest.json").read_text())
    shards = [content["train"]["shards"][0] | {"compressed": True}]
    rewrite(folder / "manifest.json", SEAL, train=content["train"] | {"shards": shards})
    with pytest.raises(UserError, match=r"manifest.json has the unknown field 'compressed'; use a newer"):
        load_manifest(folder)
    (folder / "progress.json").write_text(json.dumps({"request": {}, "parts": [], "workers": 3}))
    with pytest.raises(UserError, match=r"progress.json has the unknown field 'workers'; use a newer dsv2"):
        open_progress(folder, {})


class Command:
    """Unpickled, it runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def strange_token_bytes(marker: Path) -> dict[str, bytes]:
    import io

    def saved(array: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        return file.getvalue()

    command = np.empty(1, object)
    command[0] = Command(f"touch {marker}")
    return {
        "pickle": pickle.dumps(Command(f"touch {marker}")),
        "objects": saved(command),
        "empty": b"",
        "short": saved(np.zeros(VOCAB, np.int32))[:-1],
        "torn": saved(np.zeros(1, np.int32)).replace(b"(1,), ", b"(99999"),
        "floats": saved(np.zeros(VOCAB)),
        "fewer": saved(np.zeros(VOCAB - 1, np.int32)),
        "other": saved(np.zeros(VOCAB, np.int32)),
    }


@pytest.mark.parametrize("name", strange_token_bytes(Path("x")))
def test_strange_token_bytes_are_one_message_and_run_nothing(folder, tmp_path, name):
    marker = tmp_path / "marker"
    (folder / "token_bytes.npy").write_bytes(strange_token_bytes(marker)[name])
    for call in (lambda: check(folder), lambda: read_token_bytes(folder, load_manifest(folder))):
        with pytest.raises(UserError) as refusal:
            call()
        assert str(refusal.value).startswith(f"data.path={folder}: token_bytes.npy ")
        assert "\n" not in str(refusal.value)
    assert not marker.exists()


def shard_of(folder: Path, column: pa.Array, name: str = "input_ids") -> None:
    """Write a shard with the right name and size, and with another column."""
    shard = load_manifest(folder).train.shards[0]
    file = folder / shard.file
    schema = pa.schema([(name, column.type)])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pa.record_batch([column], schema=schema))
    os.truncate(file, shard.file_bytes)


COLUMNS = {
    "texts": pa.array(["a"]),
    "floats": pa.array([[1.0]]),
    "nulls": pa.array([[1, None]], pa.list_(pa.uint16())),
    "wide": pa.array([[1]], pa.list_(pa.int64())),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_shard_of_another_kind_is_one_message(folder, kind):
    shard_of(folder, COLUMNS[kind])
    with pytest.raises(UserError, match=r"train-00000.arrow is not a shard \("):
        open_split(folder, "train", LENGTH, VOCAB)


@pytest.mark.parametrize("name", ["manifest.json", "train-00000.arrow", "token_bytes.npy", "tokenizer.model"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_file_that_cannot_be_read_now_is_not_missing(folder, name, code, monkeypatch):
    for call in ("open", "read_text", "read_bytes"):
        monkeypatch.setattr(Path, call, refusing(getattr(Path, call), name, code))
    with pytest.raises(Unreadable, match=rf"{name}: cannot be read \({os.strerror(code)}\)"):
        check(folder)


def test_a_preparation_that_cannot_be_read_is_not_begun_again(folder, monkeypatch, capsys):
    """Its files would be written over."""
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(os, "stat", refusing(os.stat, "manifest.json", errno.ESTALE))
    assert main(["jsonl", str(folder.parent), "--out", str(folder), "--vocab-size", str(VOCAB)]) == 1
    assert "manifest.json: cannot be read" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def refusing(call: Any, name: str, code: int) -> Any:
    """Make a system call fail on files of this name."""

    def wrapped(target: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(target, int) and Path(target).name == name:
            raise OSError(code, os.strerror(code), str(target))
        return call(target, *args, **kwargs)

    return wrapped
