"""The only unit converter: text with units to numbers and back."""

from __future__ import annotations

import math
import re

from elmoe.errors import RequestError
from elmoe.untrusted import short

BYTE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
MAX_BYTES = 1 << 60
"""Largest amount of memory that is taken."""
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """``2GiB``, ``1.5 GB`` or ``4096`` to bytes; RequestError names what is wrong."""
    match = _QUANTITY.fullmatch(text)
    unit = match.group(2).upper() if match else ""
    if match is None or (unit and unit not in BYTE_UNITS):
        raise RequestError(f"'{short(text, 60)}' is not an amount of memory", "write for example 2GiB, 512MiB or 1.5GB")
    # Whole numbers stay exact; a float of more than 2^53 bytes is no amount of this world anyway.
    digits, scale = match.group(1), BYTE_UNITS.get(unit, 1)
    count = float(digits) * scale if len(digits) > 18 or "." in digits else int(digits) * scale
    if count > MAX_BYTES:
        raise RequestError(f"'{short(text, 60)}' is more than {format_bytes(MAX_BYTES)}", "write for example 2GiB")
    return int(count)


def parse_bandwidth(text: str) -> float:
    """``1.7GB/s`` to bytes per second; RequestError names what is wrong."""
    amount, slash, second = text.strip().rpartition("/")
    if slash == "" or second.strip().lower() != "s":
        raise RequestError(f"'{short(text, 60)}' is not a bandwidth", "write for example 1.7GB/s or 800MiB/s")
    rate = float(parse_bytes(amount))
    if rate <= 0:
        raise RequestError(f"the bandwidth '{text}' is not positive", "write for example 1.7GB/s")
    return rate


def parse_fast_memory(text: str) -> int | float:
    """A budget: an amount of bytes (int), or ``25%`` of the expert bytes beside the fixed parts (float in 0..1)."""
    if text.strip().endswith("%"):
        try:
            share = float(text.strip()[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise RequestError(
                f"'{short(text, 60)}' is not a share of the experts", "write for example 25%, between 0% and 100%"
            )
        return share
    count = parse_bytes(text)
    if count <= 100 and text.strip().isdigit():
        raise RequestError(
            f"'{text.strip()}' is {count} bytes", f"write {count}% for a share of the experts, or an amount such as 2GiB"
        )
    return count


def parse_memory(text: str) -> int:
    """An amount of memory as :func:`parse_bytes` takes it; a bare number of a few bytes is refused."""
    count = parse_bytes(text)
    if count < BYTE_UNITS["MIB"] and text.strip().isdigit():
        raise RequestError(f"'{text.strip()}' is {count} bytes", "write an amount such as 8GiB")
    return count


def format_bytes(count: float) -> str:
    """Bytes for people: ``31.4 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


DIMENSIONS: dict[str, dict[str, float]] = {
    "capacity": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bandwidth": {"B/s": 1, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12, "MiB/s": 2**20, "GiB/s": 2**30},
    "time": {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "frequency": {"Hz": 1, "MHz": 1e6, "GHz": 1e9},
    "throughput": {"OPS": 1, "GOPS": 1e9, "TOPS": 1e12, "GFLOPS": 1e9, "TFLOPS": 1e12},
    "energy per bit": {"J/bit": 1, "pJ/bit": 1e-12},
    "energy per byte": {"J/B": 1, "pJ/B": 1e-12},
    "energy per operation": {"J": 1, "pJ": 1e-12, "fJ": 1e-15},
    "ratio": {"": 1, "%": 1e-2, "x": 1},
    "operations per byte": {"op/B": 1},
}  # fmt: skip
"""Units by dimension, as factors to SI (bytes, bytes/s, s, Hz, op/s, J/bit, J/B, J); one is SI itself."""
LEAST, MOST = 1e-30, 1e30
"""Least and greatest value that is taken, SI: wider than any hardware, and no product of a few values overflows."""
_WITH_UNIT = re.compile(r"\s*((?:0|[1-9][0-9]*)?(?:\.[0-9]+|(?<=[0-9]))(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*")


def parse_quantity(text: str, dimension: str) -> float:
    """``102.4 GB/s`` as a bandwidth to SI; positive. RequestError for a missing unit, or one of another dimension."""
    units = DIMENSIONS[dimension]
    known = ", ".join(unit for unit in units if unit) or "none"
    match, shown = _WITH_UNIT.fullmatch(text), short(text, 60)
    if match is None:
        raise RequestError(
            f"'{shown}' is not a positive number with a unit of {dimension}", f"units of {dimension}: {known}"
        )
    number, unit = float(match.group(1)), match.group(2)
    if unit not in units:
        other = next((name for name, table in DIMENSIONS.items() if unit in table and unit), None)
        problem = (
            "has no unit" if not unit else f"has a unit of {other}" if other else f"has the unknown unit '{short(unit, 20)}'"
        )
        raise RequestError(f"'{shown}' {problem}, expected {dimension}", f"units of {dimension}: {known}")
    value = number * units[unit]
    if not 0 < number < math.inf:
        problem = "is not finite" if number else "is not positive"
        raise RequestError(f"'{shown}' {problem}", f"a {dimension} must be above zero and finite")
    if not LEAST <= value <= MOST:
        size, end, bound = ("small", "least", LEAST) if value < LEAST else ("large", "most", MOST)
        told = f"'{shown}' is too {size} for a {dimension}"
        raise RequestError(told, f"the {end} is {format_quantity(bound, dimension)}")
    return value


def format_quantity(value: float, dimension: str) -> str:
    """The shortest text that :func:`parse_quantity` reads as exactly this value; RequestError if there is none."""
    if not 0 < value < math.inf:
        raise RequestError(f"{value} is no {dimension}", f"a {dimension} must be above zero and finite")
    texts = [
        f"{repr(number).removesuffix('.0')} {unit}".strip()
        for unit, factor in DIMENSIONS[dimension].items()
        for number in {float(f"{value / factor:.12g}"), value / factor}
        if number * factor == value
    ]
    return min(texts, key=lambda text: (len(text), text))
