"""The data that the tests of this folder read."""

from pathlib import Path

import pytest

from data.config import DataConfig
from tests.unit.data.streams.helpers import local, streamed, write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("stream"))


@pytest.fixture(params=["map", "lanes"])
def config(request: pytest.FixtureRequest, folder: Path) -> DataConfig:
    return local(folder) if request.param == "map" else streamed(folder)
