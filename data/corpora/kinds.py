"""The registry of the kinds of corpora that can be prepared."""

from data.corpora.base import Corpus
from data.corpora.files import FilesCorpus
from data.corpora.hub import HubCorpus
from data.corpora.jsonl import JsonlCorpus
from data.corpora.parquet import ParquetCorpus
from data.corpora.stdlib import StdlibCorpus

CORPORA: tuple[type[Corpus], ...] = (StdlibCorpus, FilesCorpus, JsonlCorpus, ParquetCorpus, HubCorpus)
