"""Lines of metrics.jsonl and maps.jsonl that no run has written."""

import pytest

from dsv2.errors import UserError
from dsv2.monitoring.records import read_maps, read_metrics

ROWS = {
    '{"step": 1, "train/loss_lm": "<b>"}': r"metrics.jsonl, step 1: 'train/loss_lm' is no number: '<b>'",
    '{"step": 1, "train/loss_lm": [1]}': r"metrics.jsonl, step 1: 'train/loss_lm' is no number: \[1\]",
    '{"step": 1, "train/loss_lm": true}': r"metrics.jsonl, step 1: 'train/loss_lm' is no number: True",
    '{"step": Infinity}': r"metrics.jsonl, line 1: not a JSON object with a step",
    '{"step": "1"}': r"metrics.jsonl, line 1: not a JSON object with a step",
    "[" * 100_000: r"metrics.jsonl, line 1: not a JSON object with a step",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:30])
def test_a_strange_row_is_one_message(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    with pytest.raises(UserError, match=ROWS[row]):
        read_metrics(tmp_path)


@pytest.mark.parametrize("value", ["3", "[]", "[[]]", "[1, 2]", "[[1], [1, 2]]", '[["<b>"]]', "[[Infinity]]"])
def test_a_strange_map_is_one_message(tmp_path, value):
    (tmp_path / "maps.jsonl").write_text(f'{{"step": 1, "map/dev_load": {value}}}\n')
    with pytest.raises(UserError, match=r"maps.jsonl, step 1: 'map/dev_load' is no table of numbers"):
        read_maps(tmp_path)
