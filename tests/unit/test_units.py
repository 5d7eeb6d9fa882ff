"""Units of memory."""

from __future__ import annotations

import pytest

from elmoe.errors import RequestError
from elmoe.units import format_bytes, parse_bytes, parse_fast_memory


@pytest.mark.parametrize(
    "text,expected", [("4096", 4096), ("2GiB", 2**31), ("1.5 GB", 1_500_000_000), ("512mib", 2**29), ("7B", 7)]
)
def test_bytes(text, expected):
    assert parse_bytes(text) == expected == parse_fast_memory(text)


def test_shares():
    assert parse_fast_memory("25%") == 0.25 and isinstance(parse_fast_memory("100 %"), float)


@pytest.mark.parametrize("text", ["", "GiB", "2 gigabytes", "-1GiB", "1e3", "120%", "-5%", "x%", "nan%"])
def test_bad_amounts_are_named(text):
    with pytest.raises(RequestError, match=r"not an amount|not a share") as error:
        parse_fast_memory(text)
    assert "for example" in (error.value.hint or "")


def test_format():
    assert format_bytes(0) == "0 B" and format_bytes(1536) == "1.5 KiB" and format_bytes(5 * 2**40) == "5.0 TiB"
