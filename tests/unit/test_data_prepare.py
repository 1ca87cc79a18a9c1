"""Preparing a folder: what is in it, that interruptions leave no trace, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data.prepare
from data.manifest import load_manifest
from data.prepare import Settings, main, prepare, prepare_stdlib
from data.shards import ShardWriter, read_tokens, unigram_nats
from data.sources import FilesSource, JsonlSource, StdlibSource
from data.tokenizer import load_tokenizer
from dsv2.errors import UserError

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
ROOT = Path(__file__).parents[2]
VOCAB = 320


def documents(n: int = 80) -> list[str]:
    rng = np.random.default_rng(0)
    return [f"{k} é\n" + " ".join(rng.choice(WORDS, rng.integers(20, 200))) + "\n" for k in range(n)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    return path


def arguments(jsonl: Path, out: Path, *more: str) -> list[str]:
    """A command line that makes several parts of the corpus of 50 kB."""
    return ["jsonl", str(jsonl), "--out", str(out), "--vocab-size", str(VOCAB), "--shard-mb", "0.01", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


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
        JsonlSource((str(jsonl),)), tmp_path / "o", Settings(VOCAB, val_fraction=0.2), quiet=True
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
    manifest = prepare(JsonlSource((str(jsonl),)), out, Settings(VOCAB, shard_mb=0.01), quiet=True)
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
    finish, finished = ShardWriter.finish, []

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
        UserError, match=r"holds no finished preparation; make one with: python -m data\.prepare"
    ):
        load_manifest(out)
    before = {path.name: path.stat().st_ino for path in out.glob("*.arrow")}
    progress = json.loads((out / "progress.json").read_text())
    kept = {
        part[split]["file"] for part in progress["parts"] for split in ("train", "validation") if part[split]
    }
    assert (at == 0) == (not before)
    monkeypatch.setattr(ShardWriter, "finish", finish)
    monkeypatch.setattr(data.prepare, "train_tokenizer", None)  # it is there already
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
        "from data import prepare, progress\n"
        "save, calls = progress.Progress.save, []\n"
        "def killed(self, folder):\n"
        "    calls.append(save(self, folder) if len(calls) < int(sys.argv[1]) else os.kill(os.getpid(), 9))\n"
        "progress.Progress.save = killed\n"
        "prepare.main(sys.argv[2:])\n"
    )
    for saves in ("1", "2", "3"):
        ended = subprocess.run(
            [sys.executable, "-c", script, saves, *arguments(jsonl, out)], cwd=ROOT, check=False
        )
        assert ended.returncode == -signal.SIGKILL
    assert main(arguments(jsonl, out)) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_input_changed_between_runs(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = data.prepare.Progress.save

    def interrupted(self, folder: Path) -> None:
        saved(self, folder)
        if len(self.parts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(data.prepare.Progress, "save", interrupted)
    assert main(arguments(jsonl, tmp_path / "out")) == 130
    monkeypatch.setattr(data.prepare.Progress, "save", saved)
    jsonl.write_text(jsonl.read_text().replace("lorem", "Lorem", 1))
    with pytest.raises(UserError, match="the text has changed since"):
        prepare(JsonlSource((str(jsonl),)), tmp_path / "out", Settings(VOCAB, shard_mb=0.01), quiet=True)


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
    source, out = JsonlSource((str(jsonl),)), tmp_path / "out"
    manifest = prepare(source, out, Settings(VOCAB), quiet=True)
    before = contents(out)
    monkeypatch.setattr(JsonlSource, "documents", None)
    assert prepare(source, out, Settings(VOCAB), quiet=True) == manifest
    with pytest.raises(UserError, match=r"out was prepared with --vocab-size 320, now asked for 330"):
        prepare(source, out, Settings(330))
    with pytest.raises(UserError, match=r"--val-fraction 0\.05, now asked for 0\.1"):
        prepare(source, out, Settings(VOCAB, val_fraction=0.1))
    with pytest.raises(UserError, match="source jsonl, now asked for stdlib"):
        prepare_stdlib(out, VOCAB)
    with pytest.raises(UserError, match="--tokenizer none, now asked for"):
        prepare(source, out, Settings(tokenizer=str(out / "tokenizer.model")))
    assert contents(out) == before


def test_given_tokenizer(jsonl: Path, tmp_path: Path) -> None:
    first = prepare(JsonlSource((str(jsonl),)), tmp_path / "a", Settings(VOCAB), quiet=True)
    given = Settings(tokenizer=str(tmp_path / "a" / "tokenizer.model"))
    second = prepare(JsonlSource((str(jsonl),)), tmp_path / "b", given, quiet=True)
    assert second.fingerprint == first.fingerprint
    assert second.train == first.train
    assert prepare(JsonlSource((str(jsonl),)), tmp_path / "b", given, quiet=True) == second


def test_fingerprint_depends_on_all_of_the_data(jsonl: Path, tmp_path: Path) -> None:
    def fingerprint(name: str, settings: Settings) -> str:
        return prepare(JsonlSource((str(jsonl),)), tmp_path / name, settings, quiet=True).fingerprint

    first = fingerprint("a", Settings(VOCAB))
    assert fingerprint("shards", Settings(VOCAB, shard_mb=0.01)) == first  # the same tokens, cut elsewhere
    assert fingerprint("vocabulary", Settings(330)) != first
    assert fingerprint("split", Settings(VOCAB, val_fraction=0.3)) != first
    jsonl.write_text(jsonl.read_text() + '{"text": "one more"}\n')
    assert fingerprint("text", Settings(VOCAB)) != first


def test_bad_file_then_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that stopped at a binary file goes on with --on-bad-file skip."""
    folder, out = tmp_path / "corpus", tmp_path / "out"
    folder.mkdir()
    for k, text in enumerate(documents(40)):
        (folder / f"{k:02d}.txt").write_text(text)
    (folder / "20.bin").write_bytes(b"\0")
    command = ["files", str(folder), "--out", str(out), "--vocab-size", str(VOCAB)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2  # the tokenizer's line and the error's
    assert "20.bin is binary" in error
    assert main([*command, "--on-bad-file", "skip"]) == 0
    manifest = load_manifest(out)
    assert (manifest.skipped, manifest.skipped_examples) == (1, ("20.bin",))
    assert manifest.train.documents + manifest.validation.documents == 40


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give either --vocab-size .* or --tokenizer"),
        (["--vocab-size", "0"], "--vocab-size 0 must be positive"),
        (["--vocab-size", "9999"], "vocab_size 9999 is more than this text can fill"),
        (["--vocab-size", "320", "--val-fraction", "1"], r"--val-fraction 1\.0 must be at least 0"),
        (["--vocab-size", "320", "--shard-mb", "0"], r"--shard-mb 0\.0 must be positive"),
        (["--tokenizer", "missing.model"], "there is no file missing.model"),
    ],
)
def test_bad_settings(
    jsonl: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["jsonl", str(jsonl), "--out", str(tmp_path / "out"), "--quiet", *more]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error)


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="there is no text in"):
        prepare(FilesSource((str(tmp_path / "empty.txt"),)), tmp_path / "out", Settings(VOCAB))
    assert not (tmp_path / "out").exists()


def test_one_document_has_no_validation(tmp_path: Path) -> None:
    """A hash cannot split one document; the error says how to, and the way it names works."""
    path = tmp_path / "book.txt"
    path.write_text("".join(documents()))
    with pytest.raises(UserError, match=r"no document fell into the validation split .*--document-lines N"):
        prepare(FilesSource((str(path),)), tmp_path / "a", Settings(VOCAB), quiet=True)
    cut = prepare(FilesSource((str(path),), document_lines=2), tmp_path / "b", Settings(VOCAB), quiet=True)
    assert cut.validation.documents > 0
    alone = prepare(FilesSource((str(path),)), tmp_path / "c", Settings(VOCAB, val_fraction=0), quiet=True)
    assert (alone.train.documents, alone.validation.documents) == (1, 0)
    assert alone.validation.unigram_nats is None


def test_corrected_arguments_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preparation that came to nothing does not stand in the way of the next one."""
    path, out = tmp_path / "book.txt", tmp_path / "out"
    path.write_text("".join(documents()))
    command = ["files", str(path), "--out", str(out), "--quiet"]
    assert main([*command, "--vocab-size", "9999"]) == 2
    assert main([*command, "--vocab-size", str(VOCAB)]) == 2  # one document: no validation split
    assert "no document fell into the validation split" in capsys.readouterr().err
    assert main([*command, "--vocab-size", "330", "--document-lines", "2"]) == 0
    main(["files", str(path), "--out", str(tmp_path / "b"), "--vocab-size", "330", "--document-lines", "2"])
    assert contents(out) == contents(tmp_path / "b")


def test_the_split_is_by_the_text(tmp_path: Path) -> None:
    """Wherever the corpus lies and however it is cut into files; copies are on one side."""
    for folder, texts in (("here", documents()), ("there", documents()[::-1]), ("twice", documents() * 2)):
        (tmp_path / folder).mkdir()
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / folder / "rows.jsonl").write_text(rows)
        source = JsonlSource((str(tmp_path / folder),))
        prepare(source, tmp_path / ("out-" + folder), Settings(VOCAB, val_fraction=0.3), quiet=True)
    here, there, twice = (
        documents_in(tmp_path / f"out-{name}", "validation") for name in ("here", "there", "twice")
    )
    assert sorted(here) == sorted(there) == sorted(twice)[::2] == sorted(twice)[1::2]


def test_says_that_nothing_is_read_anew(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(jsonl, tmp_path / "out")) == 0
    assert "was there already" not in capsys.readouterr().out
    assert main(arguments(jsonl, tmp_path / "out")) == 0
    assert "out was there already; to read the text anew, remove that folder" in capsys.readouterr().out


def test_out_cannot_be_written(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(arguments(jsonl, tmp_path / "file" / "out")) == 2
    assert (
        capsys.readouterr().err == f"error: --out {tmp_path}/file/out: cannot be written (Not a directory)\n"
    )


def test_full_disk_then_continued(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(writer: ShardWriter):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", full)
        assert main(arguments(jsonl, tmp_path / "out")) == 1
    assert "No space left on device; put it right and run the same command again" in capsys.readouterr().err
    assert main(arguments(jsonl, tmp_path / "out")) == 0
    main(arguments(jsonl, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_foreign_folders(jsonl: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty \(thesis\.tex\) and holds no preparation"):
        prepare(JsonlSource((str(jsonl),)), foreign, Settings(VOCAB))
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"], "nothing was left there"
    with pytest.raises(UserError, match="holds no finished preparation"):
        load_manifest(foreign)
    with pytest.raises(UserError, match=r"does not exist; make one with: python -m data\.prepare"):
        load_manifest(tmp_path / "missing")
    for text in ("{}", "[]", "oops", '{"format": "dsv2-prepared", "version": 99}'):
        (foreign / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="is not a manifest of format dsv2-prepared 1"):
            load_manifest(foreign)


def test_damaged_folders(jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(JsonlSource((str(jsonl),)), out, Settings(VOCAB), quiet=True)
    shard = out / manifest.train.shards[0].file
    size = shard.stat().st_size
    os.truncate(shard, size - 8)
    with pytest.raises(UserError, match=rf"{shard.name} has {size - 8} bytes in place of {size}"):
        load_manifest(out)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing"):
        load_manifest(out)


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
    manifest = prepare(JsonlSource((str(jsonl),)), tmp_path / "out", settings, quiet=True)
    assert (manifest.dtype, manifest.vocab_size, manifest.tokenizer_file) == (
        "uint32",
        70_000,
        "tokenizer.json",
    )
    assert read_tokens(tmp_path / "out" / manifest.train.shards[0].file)[0].dtype == np.uint32


def test_prepare_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every 60th file; the whole library takes 15 s."""
    files = StdlibSource().files()[::60]
    monkeypatch.setattr(StdlibSource, "files", lambda self: files)
    manifest = prepare_stdlib(tmp_path / "out", 500, quiet=True)
    assert manifest.vocab_size == 500
    assert manifest.train.documents + manifest.validation.documents + manifest.skipped <= len(files)
    assert manifest.train.documents > 10
    assert prepare_stdlib(tmp_path / "out", 500, quiet=True) == manifest
