"""The memory that new processes may use: the machine's, or what is left in a control group."""

from pathlib import Path

import psutil
import pytest

from dsv2.parallel import host_memory
from dsv2.parallel.host_memory import free_host_memory, room_in_groups


def group(folder: Path, limit: str, usage: int, inactive: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    for name, text in zip(names, (limit, str(usage)), strict=True):
        (folder / name).write_text(f"{text}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {inactive}\n")


def test_version_2_with_a_limit_in_an_outer_group(tmp_path):
    (tmp_path / "own").write_text("0::/job/step\n")
    group(tmp_path / "job" / "step", "max", 10, 0)
    group(tmp_path / "job", "1000", 700, 50)
    assert list(room_in_groups(tmp_path / "own", tmp_path)) == [350]


def test_version_1(tmp_path):
    (tmp_path / "own").write_text("4:cpu,cpuacct:/x\n3:memory:/docker/a\n")
    group(tmp_path / "memory" / "docker" / "a", "900", 1000, 20, version=1)
    group(tmp_path / "memory", "5000", 1000, 20, version=1)
    assert list(room_in_groups(tmp_path / "own", tmp_path)) == [0, 4020]


def test_without_groups_there_is_no_limit(tmp_path):
    assert list(room_in_groups(tmp_path / "missing", tmp_path)) == []


@pytest.mark.parametrize(("limit", "free"), [("1000", 300), ("max", 5000)])
def test_the_smaller_one_counts(tmp_path, monkeypatch, limit, free):
    group(tmp_path, limit, 700, 0)
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5000}))
    assert free_host_memory() == free
