"""Which tests a plain pytest leaves out."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_collection_modifyitems


class Item(SimpleNamespace):
    def get_closest_marker(self, name: str) -> bool:
        return name == self.marker

    def add_marker(self, _: object) -> None:
        pass


@pytest.mark.parametrize(
    ("markexpr", "left_out"), [("", ["harness"]), ("not full", ["harness"]), ("harness", [])]
)
def test_the_harness_runs_only_if_it_is_asked_for(markexpr: str, left_out: list[str]) -> None:
    deselected: list[str] = []

    def record(items: list[Item]) -> None:
        deselected.extend(item.marker for item in items)

    option = SimpleNamespace(markexpr=markexpr)
    hook = SimpleNamespace(pytest_deselected=record)
    items: list[Any] = [Item(marker=name) for name in ("full", "harness", "gpu")]
    config: Any = SimpleNamespace(option=option, hook=hook)
    pytest_collection_modifyitems(config, items)
    assert deselected == left_out
    assert [item.marker for item in items] == [n for n in ("full", "harness", "gpu") if n not in left_out]
