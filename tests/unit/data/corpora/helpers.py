"""Reading a whole corpus."""

from data.corpora.base import Corpus


def read(source: Corpus) -> tuple[list[tuple[str, str]], list[str]]:
    skipped: list[str] = []
    return list(source.documents(skipped)), skipped


FILES = [("a.md", "one\n"), ("b.txt", "zwei\r\nlines é\n"), ("sub/c.txt", "three\nfour\nfive\n")]
