"""Open Hugging Face datasets as streams, quietly. Errors are one line that says what to change."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.errors import UserError, first_line

FILE_READERS = ("arrow", "csv", "json", "parquet", "text")  # the library's own readers of local files


def open_stream(
    dataset: str, subset: str | None, data_files: list[str] | None, split: str, section: str = ""
) -> Any:
    """Return the `datasets.IterableDataset` of one split.

    Args:
        section: precedes the field names in errors: "data." if the fields come from the configuration.

    Raises:
        UserError: the dataset cannot be opened; the message says why.
    """
    import datasets

    if dataset in FILE_READERS and not data_files:  # the library would read the working directory
        raise UserError(f"{section}dataset={dataset}: reads files; data_files must name them")
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    name = f"{section}dataset={dataset}: split {split!r} (subset {subset!r}, data_files {data_files!r})"
    try:
        return datasets.load_dataset(dataset, subset, data_files=data_files, split=split, streaming=True)
    except ConnectionError as error:
        raise UserError(f"{name} cannot be reached: {first_line(error)}; is there a network?") from error
    except Exception as error:  # such as RuntimeError for a folder with a loading script, which never runs
        raise UserError(f"{name} cannot be opened: {first_line(error)}") from error


def rows_of(dataset: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield a dataset's rows.

    The library reads rows in blocks, so the rows just before a broken row may be lost too.

    Raises:
        UserError: a row cannot be read; the message begins with `name` and says after which row.
    """
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    unreadable = (pa.ArrowException, DatasetsError, ValueError)  # an error of the network is none of these
    count = 0
    try:
        for row in dataset:
            count += 1
            yield row
    except unreadable as error:
        raise UserError(
            f"{name}: cannot be read after {count} rows ({first_line(error)}); fix or remove the broken row"
        ) from error


def text_of(row: Mapping[str, Any], column: str, field: str, where: str | Path) -> str:
    """Return the text of a row, "" for a null.

    Raises:
        UserError: the column is missing or holds no text; the message names `field`.
    """
    setting = f"{field} {column}" if field.startswith("--") else f"{field}={column}"
    if column not in row:
        raise UserError(f"{setting}: no such column in {where}; it has {_listed(row)}")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{setting}: that column of {where} holds {type(value).__name__}, not text")
    return value or ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no columns"
