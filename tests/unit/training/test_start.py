"""Where a run begins: only with weights whose tokenizer has the pieces of the data's."""

import json
import re
from pathlib import Path

import pytest

from data.config import DataConfig
from data.corpora.jsonl import JsonlCorpus
from data.prepare.corpus import prepare
from data.prepare.settings import Settings
from data.tokenizers.load import load_tokenizer
from data.tokenizers.train import train_tokenizer
from dsv2.config.schema import Config, EvalConfig, OptimConfig, ProfileConfig
from dsv2.errors import UserError
from dsv2.training.schedule import check_profiled_steps
from dsv2.training.start import check_files, find_start
from tests.unit.data.tokenizers.texts import SENTENCES
from tests.unit.helpers import run_verb
from tests.unit.hf.folders import TOKENIZER_PIECES, exported_folder, hf_tiny, our_model

MODEL = hf_tiny()
OTHER_TEXTS = ["other words have other pieces, of the same number\n" * 40, *SENTENCES[:9]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its export; data of their tokenizer, and of another one of the same size."""
    folder = tmp_path_factory.mktemp("folders")
    exported_folder(folder, our_model(MODEL))
    train_tokenizer(OTHER_TEXTS, TOKENIZER_PIECES, folder / "other.model")
    rows = [json.dumps({"text": f"{sentence} {number}"}) for number, sentence in enumerate(SENTENCES * 20)]
    (folder / "texts.jsonl").write_text("\n".join(rows))
    for name, tokenizer in (
        ("same", folder / "saved" / "tokenizer.model"),
        ("other", folder / "other.model"),
    ):
        settings = Settings(tokenizer=str(tokenizer), val_fraction=0.2)
        prepare(JsonlCorpus((str(folder / "texts.jsonl"),)), folder / name, settings, quiet=True)
    [checkpoint] = (folder / "saved").glob("step-*")
    state = json.loads((checkpoint / "state.json").read_text())
    state["run"]["tokenizer"] = load_tokenizer(folder / "saved" / "tokenizer.model").record()
    (checkpoint / "state.json").write_text(json.dumps(state))
    return folder


def run_on(folders: Path, data: str, **options: object) -> Config:
    return Config(
        model=MODEL,
        data=DataConfig(source="local", path=str(folders / data), sequence_length=16),
        optim=OptimConfig(total_tokens=10_000),
        eval=EvalConfig(sequences=4),
        runs_dir=str(folders / "runs"),
        **options,  # type: ignore[arg-type]
    )


def assert_names_both(message: str, folders: Path, theirs: Path) -> None:
    mine = folders / "other"
    assert message.startswith(
        f"data.path={mine}: its tokenizer {mine}/tokenizer.model has other pieces than "
    )
    assert f" than {theirs}, with which " in message
    assert "\n" not in message


def test_the_exported_tokenizer_has_the_same_pieces(folders):
    """The file is another one, and every id stands for the same bytes."""
    exported = load_tokenizer(folders / "exported" / "tokenizer.json")
    own = load_tokenizer(folders / "saved" / "tokenizer.model")
    assert exported.sha256 != own.sha256
    assert exported.pieces_sha256 == own.pieces_sha256
    assert load_tokenizer(folders / "other.model").pieces_sha256 != own.pieces_sha256
    assert load_tokenizer(folders / "other.model").vocab_size == own.vocab_size


def test_init_from(folders):
    exported = folders / "exported"
    check_files(run_on(folders, "same", init_from=str(exported)))
    with pytest.raises(UserError) as caught:
        check_files(run_on(folders, "other", init_from=str(exported)))
    assert_names_both(str(caught.value), folders, exported / "tokenizer.json")


def test_weights_without_a_tokenizer_are_not_trusted(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders / "exported" / "config.json").read_text())
    with pytest.raises(UserError, match=rf"^init_from={tmp_path}: has no tokenizer\.json to compare"):
        check_files(run_on(folders, "same", init_from=str(tmp_path)))


def test_a_new_stage(folders, tmp_path):
    [checkpoint] = (folders / "saved").glob("step-*")
    stage = {"resume": str(checkpoint), "new_stage": True}
    found = find_start(run_on(folders, "same", **stage)).found
    assert found is not None
    assert found.path == checkpoint
    with pytest.raises(UserError) as caught:
        check_files(run_on(folders, "other", **stage))
    assert_names_both(str(caught.value), folders, folders / "saved" / "tokenizer.model")


def test_profiled_steps_that_the_run_lacks(folders):
    """A resumed run counts what it has done, which a larger batch may have taken in fewer steps."""
    last = 10_000 // (16 * 16) + 1
    [checkpoint] = (folders / "saved").glob("step-*")
    for more in ({}, {"resume": str(checkpoint), "new_stage": True}):
        find_start(run_on(folders, "same", profile=ProfileConfig([1, last]), **more))
        with pytest.raises(UserError) as caught:
            find_start(run_on(folders, "same", profile=ProfileConfig([1, last + 1]), **more))
        right = f"must end at step {last} or earlier, the last step of the run"
        assert str(caught.value) == f"profile.steps=[1, {last + 1}]: {right}"
    check_profiled_steps(run_on(folders, "same", profile=ProfileConfig([1000, 1001])), 1000, 10_000 - 1)
    with pytest.raises(UserError, match="at step 1001 or earlier"):
        check_profiled_steps(run_on(folders, "same", profile=ProfileConfig([1000, 1002])), 1000, 10_000 - 1)


def test_a_checkpoint_of_an_earlier_version_names_no_tokenizer(folders):
    [checkpoint] = (folders / "saved").glob("step-*")
    text = (checkpoint / "state.json").read_text()
    state = json.loads(text)
    del state["run"]["tokenizer"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    try:
        assert find_start(run_on(folders, "other", resume=str(checkpoint), new_stage=True)).found is not None
    finally:
        (checkpoint / "state.json").write_text(text)


@pytest.mark.parametrize("verb", ["generate", "export"])
def test_text_is_made_with_the_run_s_own_tokenizer(folders, tmp_path, capsys, verb):
    more = ["--prompt", "x"] if verb == "generate" else [tmp_path / "out"]
    other = folders / "other.model"
    [checkpoint] = (folders / "saved").glob("step-*")
    assert run_verb(verb, checkpoint, *more, "--tokenizer", other) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: tokenizer {other}: has other pieces than {folders}/saved/tokenizer\.model, with which "
        r"\S+/step-00000007 was trained; --tokenizer FILE must name the one that .*\n",
        said,
    ), said
