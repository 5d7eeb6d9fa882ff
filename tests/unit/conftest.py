"""The demo model behind the Python API, opened once for a file of tests."""

from __future__ import annotations

import pytest

import elmoe


@pytest.fixture(scope="module")
def model():
    with elmoe.load("demo") as opened:
        yield opened
