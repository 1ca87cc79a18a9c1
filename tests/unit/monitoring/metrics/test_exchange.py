"""The family of the experts' exchange."""

import pytest
import torch

from dsv2.moe.traffic import bytes_per_row
from dsv2.monitoring.metrics.exchange import exchange_values


def test_exchange_metrics():
    """Two ranks, three layers, four steps."""
    rows_out = torch.tensor([[10.0, 30.0, 8.0], [30.0, 30.0, 0.0]], dtype=torch.float64)
    rows_in = torch.tensor([[30.0, 36.0, 0.0], [10.0, 24.0, 8.0]], dtype=torch.float64)
    wait_ms = torch.tensor([6.0, 2.0], dtype=torch.float64)
    row = bytes_per_row(hidden_size=100, top_k=6, element_bytes=2)
    assert row == 4 * 100 * 2 + (6 + 6 + 6) * 4
    again = bytes_per_row(hidden_size=100, top_k=6, element_bytes=2, recompute=True)
    assert again == row + 100 * 2 + (6 + 6) * 4
    assert exchange_values(
        rows_out_WL=rows_out, rows_in_WL=rows_in, wait_ms_W=wait_ms, row_bytes=row, steps=4
    ) == pytest.approx(
        {
            "comm/send_max_mean": (1.5 + 1.0 + 2.0) / 3,
            "comm/in_max_mean": (1.5 + 1.2 + 2.0) / 3,
            "comm/gib": (48 + 60) / 2 * row / 4 / 2**30,
            "comm/a2a_ms": 1.0,
        }
    )
    none = torch.zeros(2, 3)
    assert exchange_values(rows_out_WL=none, rows_in_WL=none, wait_ms_W=wait_ms, row_bytes=row, steps=4) == {}


def test_a_layer_that_sends_nothing_has_no_part_in_the_mean():
    rows = torch.tensor([[3.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    metrics = exchange_values(
        rows_out_WL=rows, rows_in_WL=rows.flip(0), wait_ms_W=torch.zeros(2), row_bytes=100, steps=1
    )
    assert (metrics["comm/send_max_mean"], metrics["comm/in_max_mean"]) == (1.5, 1.5)
