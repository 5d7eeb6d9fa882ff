"""Units of memory."""

from __future__ import annotations

import pytest

from elmoe.errors import RequestError
from elmoe.units import format_bytes, parse_bytes, parse_fast_memory, parse_memory, parse_quantity


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


@pytest.mark.parametrize("text", ["9" * 400 + "GiB", "9" * 5000, "1" + "0" * 30, "2000000000TiB"])
def test_amounts_that_are_too_large_are_refused_in_a_short_line(text):
    with pytest.raises(RequestError, match=r"more than|not an amount") as error:
        parse_bytes(text)
    assert len(str(error.value)) < 200


def test_a_budget_of_a_few_bytes_suggests_the_share():
    for text in ("25", " 100 ", "1"):
        with pytest.raises(RequestError, match="bytes") as error:
            parse_fast_memory(text)
        assert f"{text.strip()}%" in str(error.value.hint)
    assert parse_fast_memory("25B") == 25 and parse_fast_memory("101") == 101


@pytest.mark.parametrize("text", ["1e300 GB/s", "1e-40 GB/s", "1e999 GB/s", "0100 GB/s", "00.5 GB/s", "1:40 GB/s", "٣ GB/s"])
def test_quantities_no_hardware_has_or_that_read_two_ways_are_refused(text):
    with pytest.raises(RequestError):
        parse_quantity(text, "bandwidth")


def test_quantities_are_read_with_their_units():
    assert parse_quantity("102.4 GB/s", "bandwidth") == 102.4e9 and parse_quantity(".5 GB/s", "bandwidth") == 0.5e9
    assert parse_quantity("1e3 MB/s", "bandwidth") == 1e9 and parse_quantity("0.5", "ratio") == 0.5


def test_memory_of_a_few_bytes_is_refused():
    assert parse_memory("8GiB") == 8 << 30 and parse_memory("2097152") == 2 << 20
    with pytest.raises(RequestError, match="'8' is 8 bytes") as refused:
        parse_memory("8")
    assert refused.value.hint == "write an amount such as 8GiB"
