"""The only unit converter: text with units to numbers and back."""

from __future__ import annotations

import re

from elmoe.errors import RequestError

BYTE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """``2GiB``, ``1.5 GB`` or ``4096`` to bytes; RequestError names what is wrong."""
    match = _QUANTITY.fullmatch(text)
    unit = match.group(2).upper() if match else ""
    if match is None or (unit and unit not in BYTE_UNITS):
        raise RequestError(f"'{text}' is not an amount of memory", "write for example 2GiB, 512MiB or 1.5GB")
    return int(float(match.group(1)) * BYTE_UNITS.get(unit, 1))


def parse_bandwidth(text: str) -> float:
    """``1.7GB/s`` to bytes per second; RequestError names what is wrong."""
    amount, slash, second = text.strip().rpartition("/")
    if slash == "" or second.strip().lower() != "s":
        raise RequestError(f"'{text}' is not a bandwidth", "write for example 1.7GB/s or 800MiB/s")
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
            raise RequestError(f"'{text}' is not a share of the experts", "write for example 25%, between 0% and 100%")
        return share
    return parse_bytes(text)


def format_bytes(count: float) -> str:
    """Bytes for people: ``31.4 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
