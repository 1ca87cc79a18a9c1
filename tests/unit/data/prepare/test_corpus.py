"""Preparing a folder: what is in it, and that interruptions leave no trace."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data.prepare.corpus
from data.corpora.jsonl import JsonlCorpus
from data.corpora.stdlib import StdlibCorpus
from data.prepare.command import main
from data.prepare.corpus import prepare
from data.prepare.progress import Progress
from data.prepare.settings import Settings
from data.prepared.manifest import load_manifest
from data.prepared.shards import ShardWriter, read_tokens, unigram_nats
from data.tokenizers.load import load_tokenizer
from dsv2.errors import UserError
from tests.unit.corpus import VOCAB, arguments, contents, documents

ROOT = Path(__file__).parents[4]


def documents_in(folder: Path, split: str) -> list[str]:
    """The text of a split, read by the library that other people would use."""
    import datasets

    tokenizer = load_tokenizer(folder / "tokenizer.model")
    texts = []
    for shard in load_manifest(folder).split(split).shards:
        for ids in datasets.Dataset.from_file(str(folder / shard.file))["input_ids"]:
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            texts.append(tokenizer.decode(ids))
    return texts


def test_end_to_end(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(arguments(jsonl, out, "--val-fraction", "0.2")) == 0
    assert "320 pieces" in capsys.readouterr().out
    manifest = load_manifest(out)
    train, validation = documents_in(out, "train"), documents_in(out, "validation")
    assert sorted(train + validation) == sorted(documents())
    assert train == [text for text in documents() if text in set(train)]  # order is kept
    assert 5 <= len(validation) <= 30
    assert len(manifest.train.shards) > 2
    assert manifest.dtype == "uint16"
    sizes = np.load(out / "token_bytes.npy")
    for name, texts in (("train", train), ("validation", validation)):
        split = manifest.split(name)
        ids = np.concatenate([np.concatenate(read_tokens(out / shard.file)) for shard in split.shards])
        assert ids.dtype == np.uint16
        assert split.tokens == len(ids)
        assert split.documents == len(texts) == (ids == manifest.eos_id).sum()
        assert split.text_bytes == sizes[ids].sum() == sum(len(text.encode()) for text in texts)
    assert sorted(contents(out)) == sorted(
        ["manifest.json", "token_bytes.npy", "tokenizer.model"]
        + [shard.file for name in ("train", "validation") for shard in manifest.split(name).shards]
    )


def test_unigram_baseline(jsonl: Path, tmp_path: Path) -> None:
    manifest = prepare(
        JsonlCorpus((str(jsonl),)), tmp_path / "o", Settings(VOCAB, val_fraction=0.2), quiet=True
    )
    ids = {
        name: np.concatenate(read_tokens(tmp_path / "o" / manifest.split(name).shards[0].file)).tolist()
        for name in ("train", "validation")
    }
    counts = np.ones(VOCAB)
    for i in ids["train"]:
        counts[i] += 1
    expected = np.mean([-np.log(counts[i] / counts.sum()) for i in ids["validation"]])
    assert manifest.validation.unigram_nats == pytest.approx(expected, rel=1e-12)
    counts -= 1
    expected = np.mean([-np.log(counts[i] / counts.sum()) for i in ids["train"]])
    assert manifest.train.unigram_nats == pytest.approx(expected, rel=1e-12)


def test_unigram_of_known_counts() -> None:
    assert unigram_nats(np.array([2, 2, 0]), np.array([2, 2, 0])) == pytest.approx(np.log(2))
    assert unigram_nats(np.array([0, 0, 3]), np.array([1, 2, 1])) == pytest.approx(np.log(4))
    assert unigram_nats(np.zeros(3), np.ones(3)) is None


def test_load_dataset_reads_the_shards(jsonl: Path, tmp_path: Path) -> None:
    import datasets

    out = tmp_path / "out"
    manifest = prepare(JsonlCorpus((str(jsonl),)), out, Settings(VOCAB, shard_mb=0.01), quiet=True)
    loaded = datasets.load_dataset(
        "arrow",
        data_files={"train": f"{out}/train-*.arrow"},
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert len(loaded) == manifest.train.documents
    assert loaded.features["input_ids"].feature.dtype == "uint16"
    assert sum(map(len, loaded["input_ids"])) == manifest.train.tokens


@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_interrupted_and_continued(
    jsonl: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while shard number `at` is finished: the next run goes on, and ends with the same bytes."""
    main(arguments(jsonl, tmp_path / "whole"))
    finish = ShardWriter.finish
    finished = []

    def interrupted(writer: ShardWriter):
        if len(finished) == at:
            raise KeyboardInterrupt
        finished.append(finish(writer))
        return finished[-1]

    out = tmp_path / "out"
    monkeypatch.setattr(ShardWriter, "finish", interrupted)
    capsys.readouterr()
    assert main(arguments(jsonl, out)) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"holds no finished preparation; it was interrupted: run the same command"
    ):
        load_manifest(out)
    before = {path.name: path.stat().st_ino for path in out.glob("*.arrow")}
    progress = json.loads((out / "progress.json").read_text())
    kept = {
        part[split]["file"] for part in progress["parts"] for split in ("train", "validation") if part[split]
    }
    assert (at == 0) == (not before)
    monkeypatch.setattr(ShardWriter, "finish", finish)
    monkeypatch.setattr(data.prepare.corpus, "train_tokenizer", None)  # it is there already
    assert main(arguments(jsonl, out)) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert {name: (out / name).stat().st_ino for name in kept} == {name: before[name] for name in kept}
    assert at < 2 or kept


def test_killed_and_continued(jsonl: Path, tmp_path: Path) -> None:
    """SIGKILL, three times: when tokenizer or shards have their names and the progress file lacks them."""
    main(arguments(jsonl, tmp_path / "whole"))
    out = tmp_path / "out"
    script = (
        "import os, signal, sys\n"
        "from data.prepare import command, progress\n"
        "save, calls = progress.Progress.save, []\n"
        "def killed(self, folder):\n"
        "    calls.append(save(self, folder) if len(calls) < int(sys.argv[1]) else os.kill(os.getpid(), 9))\n"
        "progress.Progress.save = killed\n"
        "command.main(sys.argv[2:])\n"
    )
    for saves in ("1", "2", "3"):
        ended = subprocess.run(
            [sys.executable, "-c", script, saves, *arguments(jsonl, out)], cwd=ROOT, check=False
        )
        assert ended.returncode == -signal.SIGKILL
    assert main(arguments(jsonl, out)) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_input_changed_between_runs(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Progress.save

    def interrupted(self, folder: Path) -> None:
        saved(self, folder)
        if len(self.parts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", interrupted)
    assert main(arguments(jsonl, tmp_path / "out")) == 130
    monkeypatch.setattr(Progress, "save", saved)
    jsonl.write_text(jsonl.read_text().replace("lorem", "Lorem", 1))
    with pytest.raises(UserError, match=r"--out .*: the text has changed since"):
        prepare(JsonlCorpus((str(jsonl),)), tmp_path / "out", Settings(VOCAB, shard_mb=0.01), quiet=True)


def test_two_processes_at_once(jsonl: Path, tmp_path: Path) -> None:
    """One does the work, the other waits for it; both find the folder finished."""
    main(arguments(jsonl, tmp_path / "whole"))
    command = [sys.executable, "-m", "data.prepare", *arguments(jsonl, tmp_path / "out")]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert {out.splitlines()[-1] for out, _ in said} == {said[0][0].splitlines()[-1]}
    assert "".join(err for _, err in said).count("training a tokenizer") == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_finished_folder(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same request returns at once, without a look at the text; another one is refused."""
    source, out = JsonlCorpus((str(jsonl),)), tmp_path / "out"
    manifest = prepare(source, out, Settings(VOCAB), quiet=True)
    before = contents(out)
    monkeypatch.setattr(JsonlCorpus, "documents", None)
    assert prepare(source, out, Settings(VOCAB), quiet=True) == manifest
    with pytest.raises(UserError, match=r"out: was prepared with --vocab-size 320, now 330"):
        prepare(source, out, Settings(330))
    with pytest.raises(UserError, match=r"--val-fraction 0\.05, now 0\.1"):
        prepare(source, out, Settings(VOCAB, val_fraction=0.1))
    with pytest.raises(UserError, match="source jsonl, now stdlib"):
        prepare(StdlibCorpus(), out, Settings(VOCAB))
    with pytest.raises(UserError, match="--tokenizer none, now"):
        prepare(source, out, Settings(tokenizer=str(out / "tokenizer.model")))
    assert contents(out) == before


def test_given_tokenizer(jsonl: Path, tmp_path: Path) -> None:
    first = prepare(JsonlCorpus((str(jsonl),)), tmp_path / "a", Settings(VOCAB), quiet=True)
    given = Settings(tokenizer=str(tmp_path / "a" / "tokenizer.model"))
    second = prepare(JsonlCorpus((str(jsonl),)), tmp_path / "b", given, quiet=True)
    assert second.fingerprint == first.fingerprint
    assert second.train == first.train
    assert prepare(JsonlCorpus((str(jsonl),)), tmp_path / "b", given, quiet=True) == second


def test_fingerprint_depends_on_all_of_the_data(jsonl: Path, tmp_path: Path) -> None:
    def fingerprint(name: str, settings: Settings) -> str:
        return prepare(JsonlCorpus((str(jsonl),)), tmp_path / name, settings, quiet=True).fingerprint

    first = fingerprint("a", Settings(VOCAB))
    assert fingerprint("shards", Settings(VOCAB, shard_mb=0.01)) == first  # the same tokens, cut elsewhere
    assert fingerprint("vocabulary", Settings(330)) != first
    assert fingerprint("split", Settings(VOCAB, val_fraction=0.3)) != first
    jsonl.write_text(jsonl.read_text() + '{"text": "one more"}\n')
    assert fingerprint("text", Settings(VOCAB)) != first


def test_the_split_is_by_the_text(tmp_path: Path) -> None:
    """Wherever the corpus lies and however it is cut into files; copies are on one side."""
    for folder, texts in (("here", documents()), ("there", documents()[::-1]), ("twice", documents() * 2)):
        (tmp_path / folder).mkdir()
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / folder / "rows.jsonl").write_text(rows)
        source = JsonlCorpus((str(tmp_path / folder),))
        prepare(source, tmp_path / ("out-" + folder), Settings(VOCAB, val_fraction=0.3), quiet=True)
    here, there, twice = (
        documents_in(tmp_path / f"out-{name}", "validation") for name in ("here", "there", "twice")
    )
    assert sorted(here) == sorted(there) == sorted(twice)[::2] == sorted(twice)[1::2]


def test_says_that_nothing_is_read_anew(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(jsonl, tmp_path / "out")) == 0
    assert "already exists" not in capsys.readouterr().out
    assert main(arguments(jsonl, tmp_path / "out")) == 0
    assert "out already exists; to read the text again, remove that folder" in capsys.readouterr().out


def test_large_vocabulary_takes_uint32(jsonl: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate(["<s>", "</s>", *alphabet])}
    filler = {"a" * 3 + str(i): i for i in range(len(vocabulary), 70_000)}
    made = Tokenizer(models.BPE(vocab=vocabulary | filler, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    settings = Settings(tokenizer=str(tmp_path / "tokenizer.json"))
    manifest = prepare(JsonlCorpus((str(jsonl),)), tmp_path / "out", settings, quiet=True)
    assert (manifest.dtype, manifest.vocab_size, manifest.tokenizer_file) == (
        "uint32",
        70_000,
        "tokenizer.json",
    )
    assert read_tokens(tmp_path / "out" / manifest.train.shards[0].file)[0].dtype == np.uint32


def test_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every 60th file; the whole library takes 15 s."""
    files = StdlibCorpus().files()[::60]
    monkeypatch.setattr(StdlibCorpus, "files", lambda self: files)
    manifest = prepare(StdlibCorpus(), tmp_path / "out", Settings(500), quiet=True)
    assert manifest.vocab_size == 500
    assert manifest.train.documents + manifest.validation.documents + manifest.skipped <= len(files)
    assert manifest.train.documents > 10
    assert prepare(StdlibCorpus(), tmp_path / "out", Settings(500), quiet=True) == manifest
