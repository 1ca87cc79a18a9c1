"""Texts on the command line: each arrives as typed, though Hydra would read it as something else."""

import os
import subprocess
import sys
from collections.abc import Iterator
from operator import attrgetter

import pytest
from omegaconf import OmegaConf

from dsv2.config.compose import compose_config, from_plain, to_plain
from dsv2.config.schema import Config
from dsv2.config.sections import check_run
from dsv2.config.typed import as_typed
from dsv2.errors import UserError
from tests.unit.helpers import REPO

NUMBERS = ["12e5678", "98e7654", "3.10", "1e3", "1_000", "007", "+1", "0x10", "1:30", "2024-01-01"]
WORDS = [
    "true",
    "True",
    "NULL",
    "nan",
    "inf",
    "-inf",
    "off",
    "~",
    "",
    " a ",
    "a b",
    "ü",
    "😀",
    "a\nb",
    "a\tb",
]
GRAMMAR = [
    "a,b",
    "[1]",
    "{a:1}",
    "choice(a,b)",
    "range(1,3)",
    "lang=de",
    "(x",
    "x)",
    "=",
    "@x",
    "#x",
    "a;b",
    "*",
]
QUOTES = ['"', "'", '"a', "it's", 'say "hi"', "'a' and 'b'", "a\\b", "a\\", 'x\\"', '\\\\\\"', "x\\\\"]
INTERPOLATIONS = ["${name}", "${oc.env:HOME}", "\\${x}", "\\\\${x}", "${x", "$", "}{"]
TEXTS = [*NUMBERS, *WORDS, *GRAMMAR, *QUOTES, *INTERPOLATIONS]
FIELDS = [
    "name",
    "runs_dir",
    "init_from",
    "resume",
    "data.path",
    "data.dataset",
    "data.subset",
    "data.split",
    "data.val_split",
    "data.text_column",
    "data.tokenizer",
    "logging.project",
    "logging.entity",
    "eval.sample_prompt",
]


def batches() -> Iterator[dict[str, str]]:
    """As many texts at once as there are fields: composing takes a while."""
    for start in range(0, len(TEXTS), len(FIELDS)):
        yield dict(zip(FIELDS, TEXTS[start : start + len(FIELDS)], strict=False))


@pytest.mark.parametrize("typed", list(batches()))
def test_every_text_arrives_as_typed(typed):
    config = compose_config([f"{name}={text}" for name, text in {"data.path": "x", **typed}.items()])
    arrived = {name: attrgetter(name)(config) for name in typed}
    assert arrived == typed
    assert from_plain(to_plain(config)) == config, "a checkpoint keeps the texts too"


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("[1e3,true]", ["1e3", "true"]),
        ("[a=b/[0-9].jsonl, ü.jsonl]", ["a=b/[0-9].jsonl", "ü.jsonl"]),
        ("['a,b',c]", ["a,b", "c"]),
        ("null", None),
    ],
)
def test_a_list_of_texts(typed, wanted):
    assert compose_config(["data.path=x", f"data.data_files={typed}"]).data.data_files == wanted


def test_null_is_null_where_a_field_may_be_null():
    config = compose_config(["data.path=x", "init_from=null", "name=null"])
    assert (config.init_from, config.name) == (None, "null")


def test_a_value_in_quotes_follows_hydras_rules():
    config = compose_config(["data.path=x", "name='a b'", 'runs_dir="${data.path}/y"', "optim.lr=1e-3"])
    assert (config.name, config.runs_dir, config.optim.lr) == ("a b", "x/y", 1e-3)


@pytest.mark.parametrize(
    "word", ["optim.lr=1e3", "seed=007", "model=lite", "--cfg", "job", "experiment=lite"]
)
def test_words_that_set_no_text_are_left_alone(word):
    assert as_typed(word) == word


def test_train_py_reads_its_command_line_alike(tmp_path):
    """Hydra itself reads that command line."""
    command = [sys.executable, str(REPO / "train.py"), "--cfg", "job", "name=12e5678", "data.subset=3.10"]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = OmegaConf.create(done.stdout)
    assert (shown.name, shown.data.subset) == ("12e5678", "3.10")


@pytest.mark.parametrize(
    "name", ["a\nb", "<b>", "a b", "ü", "x" * 101, "x" * 300, ".", "..", "", "a/b", "a\\b", "a,b", "${x}"]
)
def test_a_name_that_is_no_plain_folder_name_is_refused(name):
    with pytest.raises(UserError) as refusal:
        check_run(Config(name=name))
    assert str(refusal.value).startswith(
        f"name={name!r}: must be a plain folder name, such as my-run: at most"
    )
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["a", "x" * 100, "Run_3.10-b", "12e5678", "-", "..."])
def test_other_names_are_not(name):
    check_run(Config(name=name))
