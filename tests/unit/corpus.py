"""A small corpus, the command line that prepares it, and what that leaves."""

from pathlib import Path

import numpy as np

WORDS = [
    "lorem",
    "ipsum",
    "dolor",
    "sit",
    "amet",
    "consectetur",
    "adipiscing",
    "elit",
    "sed",
    "do",
    "eiusmod",
    "tempor",
    "incididunt",
    "ut",
]
VOCAB = 320


def documents(n: int = 80) -> list[str]:
    rng = np.random.default_rng(0)
    return [f"{k} é\n" + " ".join(rng.choice(WORDS, rng.integers(20, 200))) + "\n" for k in range(n)]


def arguments(jsonl: Path, out: Path, *more: str) -> list[str]:
    """A command line that makes several parts of the corpus of 50 kB."""
    return ["jsonl", str(jsonl), "--out", str(out), "--vocab-size", str(VOCAB), "--shard-mb", "0.01", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}
