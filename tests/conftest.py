"""What every room's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """A pool of gloo ranks, kept for the session."""
    pool = Ranks()
    yield pool
    pool.close()
