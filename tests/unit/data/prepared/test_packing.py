"""Packed sequences against the plain concatenation of the documents."""

import dataclasses
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.prepared.manifest import SEAL, TOKEN_BYTES, Manifest, Split, to_json
from data.prepared.packing import open_split
from data.prepared.shards import ShardWriter, read_tokens
from data.sealed import seal, unseal
from dsv2.errors import UserError
from tests.unit.helpers import REPO


def write_folder(folder: Path, shards: list[list[list[list[int]]]], dtype: type = np.uint16) -> None:
    """Write a prepared folder by hand: shards of record batches of documents of ids."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, batches in enumerate(shards):
        writer = ShardWriter(folder, f"train-{number:05d}.arrow", np.dtype(dtype))
        for documents in batches:
            writer.write(documents, 0)
        written.append(writer.finish())
    (folder / "tokenizer.model").touch()
    (folder / TOKEN_BYTES).touch()
    manifest = Manifest(
        request={},
        source="",
        tokenizer_file="tokenizer.model",
        tokenizer_sha256="",
        vocab_size=100,
        bos_id=1,
        eos_id=2,
        dtype=np.dtype(dtype).name,
        train=Split(tuple(written), 0.0),
        validation=Split((), None),
        skipped=0,
        skipped_examples=(),
        fingerprint="",
    )
    (folder / "manifest.json").write_text(to_json(manifest))


def tokens_of(shards: list[list[list[list[int]]]]) -> list[int]:
    return [i for batches in shards for documents in batches for ids in documents for i in ids]


documents = st.lists(st.integers(0, 99), min_size=1, max_size=9)
batches = st.lists(documents, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(st.lists(batches, min_size=1, max_size=3), min_size=1, max_size=3),
    length=st.integers(1, 12),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_against_a_slow_concatenation(
    tmp_path_factory: pytest.TempPathFactory, shards: list, length: int, dtype: type
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    write_folder(folder, shards, dtype)
    tokens = tokens_of(shards)
    expected = [tokens[i : i + length + 1] for i in range(0, len(tokens) - length, length)]
    if not expected:
        with pytest.raises(UserError, match=f"has {len(tokens)} tokens; one sequence takes {length + 1}"):
            open_split(folder, "train", length, 100)
        return
    packed = open_split(folder, "train", length, 100)
    assert len(packed) == len(expected)
    everything = packed.take(np.arange(len(packed)))
    assert everything.dtype == np.int64
    assert everything.tolist() == expected
    backwards = np.arange(len(packed))[::-1]
    assert packed.take(backwards).tolist() == expected[::-1]
    assert packed[len(packed) - 1].tolist() == expected[-1]


def test_shards_are_memory_mapped(tmp_path: Path) -> None:
    """The arrays are views of the file: not writable, not owners of their data."""
    write_folder(tmp_path, [[[[1, 2, 3]], [[4]]]])
    arrays = read_tokens(tmp_path / "train-00000.arrow")
    assert [values.tolist() for values in arrays] == [[1, 2, 3], [4]]
    assert not any(values.flags.owndata or values.flags.writeable for values in arrays)


def test_too_short(tmp_path: Path) -> None:
    write_folder(tmp_path, [[[[1, 5, 6, 2]]]])
    assert len(open_split(tmp_path, "train", 3, 100)) == 1
    with pytest.raises(UserError, match=r"data\.sequence_length=4: the train split of .* has 4 tokens"):
        open_split(tmp_path, "train", 4, 100)
    with pytest.raises(UserError, match=r"data\.sequence_length=4: the validation split of .* has 0 tokens"):
        open_split(tmp_path, "validation", 4, 100)


def test_token_outside_the_vocabulary(tmp_path: Path) -> None:
    write_folder(tmp_path, [[[[1, 5, 6, 2]]], [[[1, 50, 6, 2]]]])
    assert open_split(tmp_path, "train", 3, 51).take(np.arange(2)).max() == 50
    packed = open_split(tmp_path, "train", 3, 50)
    assert packed[0].tolist() == [1, 5, 6, 2]
    with pytest.raises(
        UserError, match=r"model\.vocab_size=50: must be above 50, a token id in .*train-00001\.arrow"
    ):
        packed.take(np.array([0, 1]))


def test_index_outside(tmp_path: Path) -> None:
    write_folder(tmp_path, [[[[1, 5, 6, 2]]]])
    packed = open_split(tmp_path, "train", 1, 100)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=r"not in \[0, 3\)"):
            packed.take(np.array([index]))


def test_shard_that_is_not_what_the_manifest_says(tmp_path: Path) -> None:
    write_folder(tmp_path, [[[[1, 5, 6, 2]]]])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(seal(_with_shard(unseal(manifest, SEAL), tokens=5), SEAL)))
    with pytest.raises(UserError, match=r"train-00000\.arrow holds 4 tokens instead of 5"):
        open_split(tmp_path, "train", 2, 100)
    shard = tmp_path / "train-00000.arrow"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(UserError, match=r"train-00000\.arrow is not a shard"):
        open_split(tmp_path, "train", 2, 100)


def _with_shard(manifest: dict, **changes: int) -> dict:
    shard = manifest["train"]["shards"][0]
    return manifest | {"train": manifest["train"] | {"shards": [shard | changes]}}


def test_writer_counts(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "s.arrow", np.dtype(np.uint16))
    writer.write([[1, 7, 2], [1, 2]], 11)
    assert [path.name for path in tmp_path.iterdir()] == ["s.arrow.part"]
    writer.write([[1, 8, 9, 2]], 5)
    shard = writer.finish()
    size = (tmp_path / "s.arrow").stat().st_size
    assert dataclasses.asdict(shard) == {
        "file": "s.arrow", "documents": 3, "tokens": 9, "text_bytes": 16, "file_bytes": size,
        "crc32": tuple(zlib.crc32(np.array(ids, np.uint16)) for ids in ([1, 7, 2, 1, 2], [1, 8, 9, 2])),
    }  # fmt: skip


def test_reading_tokens_does_not_import_pandas(tmp_path):
    """Importing pandas takes 0.5 s."""
    writer = ShardWriter(tmp_path, "train-00000.arrow", np.dtype(np.uint16))
    writer.write([np.arange(9, dtype=np.uint16)], 0)
    writer.finish()
    code = "import sys, pathlib, data.prepared.shards as s; [ids] = s.read_tokens(pathlib.Path(sys.argv[1]));"
    code += "sys.exit(ids.tolist() != list(range(9)) or 'pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "train-00000.arrow"], cwd=REPO, check=True)
