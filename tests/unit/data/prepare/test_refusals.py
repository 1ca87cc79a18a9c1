"""Preparing a folder: what is refused, what is damaged, and how it goes on from there."""

import os
import re
from pathlib import Path

import pytest

from data.corpora.files import FilesCorpus
from data.corpora.jsonl import JsonlCorpus
from data.prepare.command import main
from data.prepare.corpus import prepare
from data.prepare.settings import Settings
from data.prepared.manifest import load_manifest
from data.prepared.shards import ShardWriter
from dsv2.errors import UserError
from tests.unit.corpus import VOCAB, arguments, contents, documents


def test_bad_file_then_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that stopped at a binary file goes on with --on-bad-file skip."""
    folder = tmp_path / "corpus"
    out = tmp_path / "out"
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
        ([], "--vocab-size: must be given, to train a tokenizer; or give --tokenizer FILE"),
        (
            ["--vocab-size", "320", "--tokenizer", "a"],
            "--vocab-size 320: must not be given with --tokenizer a",
        ),
        (["--vocab-size", "2"], "--vocab-size 2: must be at least 260"),
        (["--vocab-size", "9999"], r"--vocab-size 9999: .* a value <= \d+"),
        (["--vocab-size", "320", "--val-fraction", "1"], r"--val-fraction 1\.0: must be at least 0"),
        (["--vocab-size", "320", "--shard-mb", "0"], r"--shard-mb 0\.0: must be above 0"),
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


def test_documents_of_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["files", "x", "--out", "out", "--vocab-size", "320", "--document-lines", "0"]) == 2
    assert capsys.readouterr().err == "error: --document-lines 0: must be at least 1\n"


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="there is no text in"):
        prepare(FilesCorpus((str(tmp_path / "empty.txt"),)), tmp_path / "out", Settings(VOCAB))
    assert not (tmp_path / "out").exists()


def test_one_document_has_no_validation(tmp_path: Path) -> None:
    """A hash cannot split one document; the error says how to, and the way it names works."""
    path = tmp_path / "book.txt"
    path.write_text("".join(documents()))
    with pytest.raises(
        UserError, match=r"fraction 0\.05: leaves the validation split empty; .*--document-lines N"
    ):
        prepare(FilesCorpus((str(path),)), tmp_path / "a", Settings(VOCAB), quiet=True)
    cut = prepare(FilesCorpus((str(path),), document_lines=2), tmp_path / "b", Settings(VOCAB), quiet=True)
    assert cut.validation.documents > 0
    alone = prepare(FilesCorpus((str(path),)), tmp_path / "c", Settings(VOCAB, val_fraction=0), quiet=True)
    assert (alone.train.documents, alone.validation.documents) == (1, 0)
    assert alone.validation.unigram_nats is None


@pytest.mark.parametrize(("fraction", "empty"), [(0.0001, "validation"), (0.9999, "train")])
def test_the_fraction_that_the_error_names_fills_both_splits(
    tmp_path: Path, fraction: float, empty: str
) -> None:
    for index, text in enumerate(documents()[:6]):
        (tmp_path / f"{index}.txt").write_text(text)
    source = FilesCorpus((str(tmp_path / "*.txt"),))
    prepare(source, tmp_path / "all", Settings(VOCAB, val_fraction=0), quiet=True)
    tokenizer = str(tmp_path / "all" / "tokenizer.model")
    with pytest.raises(UserError, match=f"leaves the {empty} split empty") as refusal:
        prepare(source, tmp_path / "out", Settings(None, tokenizer, fraction), quiet=True)
    found = re.search(
        rf"{fraction}: leaves the {empty} split empty; --val-fraction ([\d.]+) holds out (\d) of 6; or give",
        str(refusal.value),
    )
    assert found, refusal.value
    done = prepare(source, tmp_path / "out", Settings(None, tokenizer, float(found[1])), quiet=True)
    assert done.validation.documents == int(found[2]) > 0
    assert done.train.documents == 6 - int(found[2]) > 0


def test_corrected_arguments_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preparation that came to nothing does not stand in the way of the next one."""
    path = tmp_path / "book.txt"
    out = tmp_path / "out"
    path.write_text("".join(documents()))
    command = ["files", str(path), "--out", str(out), "--quiet"]
    assert main([*command, "--vocab-size", "9999"]) == 2
    assert main([*command, "--vocab-size", str(VOCAB)]) == 2  # one document: no validation split
    assert "leaves the validation split empty" in capsys.readouterr().err
    assert main([*command, "--vocab-size", "330", "--document-lines", "2"]) == 0
    main(["files", str(path), "--out", str(tmp_path / "b"), "--vocab-size", "330", "--document-lines", "2"])
    assert contents(out) == contents(tmp_path / "b")


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
    assert (
        "No space left on device; correct the cause and run the same command again" in capsys.readouterr().err
    )
    assert main(arguments(jsonl, tmp_path / "out")) == 0
    main(arguments(jsonl, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_foreign_folders(jsonl: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty \(thesis\.tex\) and not prepared"):
        prepare(JsonlCorpus((str(jsonl),)), foreign, Settings(VOCAB))
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"], "nothing was left there"
    with pytest.raises(UserError, match="holds no finished preparation"):
        load_manifest(foreign)
    with pytest.raises(UserError, match=r"does not exist; make one with: python -m dsv2 prepare"):
        load_manifest(tmp_path / "missing")
    for text in ("{}", "[]", "oops", '{"format": "dsv2-prepared", "version": 99}'):
        (foreign / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json is not of format dsv2-prepared 1"):
            load_manifest(foreign)


def test_damaged_folders(jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(JsonlCorpus((str(jsonl),)), out, Settings(VOCAB), quiet=True)
    shard = out / manifest.train.shards[0].file
    size = shard.stat().st_size
    os.truncate(shard, size - 8)
    with pytest.raises(UserError, match=rf"{shard.name} has {size - 8} bytes instead of {size}"):
        load_manifest(out)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing"):
        load_manifest(out)
