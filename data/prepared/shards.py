"""Arrow shards of token ids: one row per document, read back as memory-mapped arrays without a copy.

A shard is an Arrow IPC stream with the one column `input_ids`, which `datasets.load_dataset("arrow",
data_files=...)` and `datasets.Dataset.from_file` read too.
"""

import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.errors import UserError, first_line
from data.prepared.manifest import AGAIN, Shard
from data.reading import reading

COLUMN = "input_ids"


class ShardWriter:
    """Write one shard under a temporary name. `finish` renames it, so only whole shards have final names."""

    def __init__(self, folder: Path, file: str, dtype: np.dtype) -> None:
        import pyarrow as pa

        self._path = folder / file
        self._aside = folder / (file + ".part")
        self._dtype = dtype
        self._schema = pa.schema([(COLUMN, pa.list_(pa.from_numpy_dtype(dtype)))])
        self._sink = pa.OSFile(str(self._aside), "wb")
        self._stream = pa.ipc.new_stream(self._sink, self._schema)
        self._documents = 0
        self._tokens = 0
        self._text_bytes = 0
        self._crc32: list[int] = []

    def write(self, documents: Sequence[Sequence[int]], text_bytes: int) -> None:
        """Append documents (their ids, bos and eos included) as one record batch."""
        import pyarrow as pa

        offsets = np.zeros(len(documents) + 1, np.int32)
        np.cumsum([len(ids) for ids in documents], out=offsets[1:])
        values = np.concatenate([np.asarray(ids, self._dtype) for ids in documents])
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
        self._stream.write_batch(pa.record_batch([column], schema=self._schema))
        self._documents += len(documents)
        self._tokens += len(values)
        self._text_bytes += text_bytes
        self._crc32.append(zlib.crc32(values.data))

    def finish(self) -> Shard:
        self.close()
        size = self._aside.stat().st_size
        os.replace(self._aside, self._path)
        return Shard(
            file=self._path.name,
            documents=self._documents,
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            file_bytes=size,
            crc32=tuple(self._crc32),
        )

    def close(self) -> None:
        """Close the file. Without `finish` its name stays temporary, and the next run writes it again."""
        if not self._sink.closed:
            self._stream.close()
            self._sink.close()


def read_tokens(path: Path) -> list[np.ndarray]:
    """Return the ids of a shard as memory-mapped arrays, one per record batch, in order.

    Raises:
        UserError: the file is no shard.
        Unreadable: the file system refuses to read it.
    """
    import pyarrow as pa

    types = [pa.list_(pa.uint16()), pa.list_(pa.uint32())]
    try:
        with reading(path):
            path.open("rb").close()  # pyarrow's errors do not tell a refused read from a strange file
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            if (kind := stream.schema.field(COLUMN).type) not in types:
                raise pa.ArrowInvalid(f"{COLUMN} is of type {kind}")
            batches = list(stream)
        for batch in batches:
            batch.validate()  # that the ids lie within the file
        columns = [batch.column(COLUMN).flatten() for batch in batches]
        if any(column.null_count for column in columns):
            raise pa.ArrowInvalid(f"{COLUMN} has ids that are null")
        return [np.from_dlpack(column) for column in columns]  # to_numpy would import pandas
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(
            f"data: {path} is not a shard ({first_line(error)}); prepare its folder again"
        ) from error


def open_shard(folder: Path, shard: Shard) -> list[np.ndarray]:
    """Return `read_tokens` of a shard, after a look at the number of tokens and of record batches.

    Raises:
        UserError: the manifest says another number.
    """
    arrays = read_tokens(folder / shard.file)
    tokens = sum(map(len, arrays))
    if tokens != shard.tokens:
        raise UserError(
            f"data.path={folder}: {shard.file} holds {tokens} tokens instead of {shard.tokens}; {AGAIN}"
        )
    if shard.crc32 and len(arrays) != len(shard.crc32):
        raise UserError(
            f"data.path={folder}: {shard.file} holds {len(arrays)} record batches instead of "
            f"{len(shard.crc32)}; {AGAIN}"
        )
    return arrays


def check_batch(ids: np.ndarray, crc32: int, file: Path, number: int) -> None:
    """Refuse a record batch whose ids are not those that were written."""
    if zlib.crc32(ids.data) != crc32:
        raise UserError(
            f"data.path={file.parent}: {file.name} does not hold what was written (the checksum of record "
            f"batch {number} differs); {AGAIN}"
        )


def verified_tokens(folder: Path, shard: Shard) -> list[np.ndarray]:
    """Return the ids of a shard, one array per record batch, after a look at every checksum."""
    arrays = open_shard(folder, shard)
    for number, (ids, crc32) in enumerate(zip(arrays, shard.crc32, strict=False)):
        check_batch(ids, crc32, folder / shard.file, number)
    return arrays


def count_tokens(folder: Path, shards: Iterable[Shard], vocab_size: int) -> np.ndarray:
    """Return int64 [vocab_size]: how often each id occurs in the shards, each of which is verified."""
    counts = np.zeros(vocab_size, np.int64)
    for shard in shards:
        for values in verified_tokens(folder, shard):
            counts += np.bincount(values, minlength=vocab_size)
    return counts


def unigram_nats(counts: np.ndarray, model_counts: np.ndarray) -> float | None:
    """Return the mean nats per token of coding `counts` by the frequencies of `model_counts`.

    Both have one count per token id. If they are equal, the result is the entropy of `counts`. The result is
    None if `counts` is empty or all 0.
    """
    total = counts.sum()
    if total == 0:
        return None
    seen = counts > 0
    log_probabilities = np.log(model_counts[seen]) - np.log(model_counts.sum())
    return float(-(counts[seen] * log_probabilities).sum() / total)
