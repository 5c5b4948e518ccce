"""The warm process that every kill trial here is forked from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from trials import Driver


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """The warm process."""
    made = Driver(tmp_path_factory.mktemp("trials"))
    yield made
    made.close()
