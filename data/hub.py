"""Hugging Face datasets opened as streams: quietly, and with errors in one line that say what to change."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.errors import UserError

FILE_READERS = ("arrow", "csv", "json", "parquet", "text")  # the library's own readers of local files


def open_stream(
    dataset: str, subset: str | None, data_files: list[str] | None, split: str, section: str = ""
) -> Any:
    """Return the `datasets.IterableDataset` of one split; a UserError says why it cannot be opened.

    `section` stands before the field names in errors: "data." if they come from the configuration.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    if dataset in FILE_READERS and not data_files:  # the library would read the working directory
        raise UserError(f"{section}dataset={dataset}: reads files; data_files must name them")
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    name = f"{section}dataset={dataset}: split {split!r} (subset {subset!r}, data_files {data_files!r})"
    try:
        return datasets.load_dataset(dataset, subset, data_files=data_files, split=split, streaming=True)
    except (DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise UserError(f"{name} cannot be opened: {_first_line(error)}") from error
    except ConnectionError as error:
        raise UserError(f"{name} cannot be reached: {_first_line(error)}; is there a network?") from error


def rows_of(dataset: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield a dataset's rows; a UserError, which begins with `name`, says where one cannot be read.

    The library reads rows in blocks, so a broken row may stop the rows shortly before it as well.
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
            f"{name}: cannot be read after {count} rows ({_first_line(error)}); fix or remove the broken row"
        ) from error


def text_of(row: Mapping[str, Any], column: str, field: str, where: str | Path) -> str:
    """Return the text of a row, "" for a null; a UserError names `field` if the column holds no text."""
    setting = f"{field} {column}" if field.startswith("--") else f"{field}={column}"
    if column not in row:
        raise UserError(f"{setting}: no such column in {where}; it has {_listed(row)}")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{setting}: that column of {where} holds {type(value).__name__}, not text")
    return value or ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no columns"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
