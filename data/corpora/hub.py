"""A Hugging Face dataset, streamed; a document's id is its position in the stream."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from data.corpora.base import Corpus, Document
from data.hub import open_stream, rows_of, text_of


@dataclass(frozen=True)
class HubCorpus(Corpus):
    kind = "hub"
    summary = "A Hugging Face dataset, read from the network as a stream."
    costly = True

    dataset: str = field(metadata={"help": "The dataset's name on the hub, such as allenai/c4."})
    subset: str | None = field(default=None, metadata={"help": "The dataset's configuration, such as en."})
    split: str = field(default="train", metadata={"help": "The split to read."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        rows = rows_of(open_stream(self.dataset, self.subset, None, self.split), f"dataset={self.dataset}")
        for number, row in enumerate(rows):
            if text := text_of(row, self.text_column, "--text-column", f"row {number} of {self.dataset}"):
                yield str(number), text
