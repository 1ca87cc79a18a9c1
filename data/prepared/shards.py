"""Arrow shards of token ids: one row per document, read back as memory-mapped arrays without a copy.

A shard is an Arrow IPC stream with the one column `input_ids`, which `datasets.load_dataset("arrow",
data_files=...)` and `datasets.Dataset.from_file` read too.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.prepared.manifest import Shard

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
        )

    def close(self) -> None:
        """Close the file. Without `finish` its name stays temporary, and the next run writes it again."""
        if not self._sink.closed:
            self._stream.close()
            self._sink.close()


def read_tokens(path: Path) -> list[np.ndarray]:
    """Return the ids of a shard as memory-mapped arrays, one per record batch, in order."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            columns = [batch.column(COLUMN) for batch in stream]
            return [column.flatten().to_numpy(zero_copy_only=True) for column in columns]
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(f"data: {path} is not a shard ({error}); prepare its folder again") from error


def count_tokens(paths: Iterable[Path], vocab_size: int) -> np.ndarray:
    """Return int64 [vocab_size]: how often each id occurs in the shards."""
    counts = np.zeros(vocab_size, np.int64)
    for path in paths:
        for values in read_tokens(path):
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
