"""Changes of valid inputs: of bytes, of the tree of a JSON document, and of the lines of a text. Seeded by the caller."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any, Literal

Kind = Literal["binary", "json", "text", "safetensors"]

NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 64, 127, 128, 255, 256, 1023, 1024, 4096, 65535, 65536, 1 << 20, (1 << 31) - 1,
    1 << 31, (1 << 32) - 1, 1 << 32, 268435460, 268435472, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30,
    -(1 << 31), -(1 << 63),
)  # fmt: skip
"""Numbers at which types, pages and blocks end."""
VALUES: tuple[Any, ...] = (
    *NUMBERS, 0.0, -0.0, 0.5, 1e-30, 1e30, 1e300, float("nan"), float("inf"), None, True, False, "", "a", "\0", "\x1b[2J",
    "[/x]", "é\u2028", "x" * 10_000, "../x", "/", "nan", "1e400", [], {}, [[]], [None], {"": None}, [1, 2, 3], ["a"],
    {"a": 1},
)  # fmt: skip
"""What stands in place of a value of a JSON document."""
TOKENS = (
    "{", "}", "[", "]", ":", ",", "- ", "&a ", "*a", "!!bool ", "!!python/object:os.system ", "<<: ", "? ", "| ", "> ", "'",
    '"', "#", "\n", "\r\n", "\t", "~", "0100", "1:40", "0x10", "1e300", "1e400", ".nan", ".inf", "-1", "0", "9" * 60,
    " GB/s",    " pJ/bit", "%", "\0", "\ufeff", "\ud7ff", "{{ ", " }}", "{% ", " %}", "{% for i in range(9**9) %}",
    "{% endfor %}",
    "{% set x = 'x' * 9**9 %}", "{{ x|center(10**9) }}", "{{ ''.__class__ }}", "{% include 'x' %}", "messages", "namespace(",
    "|tojson", "{{ raise_exception(1) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "(" * 300, "loop", "not ",
    "**9**9", "{{ messages * 10**8 }}", "{% generation %}", "{{ strftime_now('%Y' * 10**7) }}",
)  # fmt: skip
"""What is put into a text."""
VALUES_MORE = 100_000
"""Most values that one change adds to a document: copies of copies of copies would take hours and all memory."""
TEXT_MORE = 1 << 26
"""Most characters that one change adds to a text."""


def mutated(rng: Random, seeds: Sequence[bytes], kind: Kind) -> bytes:
    """One of the seeds with one to four changes."""
    seed = rng.choice(seeds)
    if kind == "safetensors":
        return _safetensors(rng, seed)
    if kind == "json" and rng.random() < 0.8:
        return _tree(rng, seed)
    if kind == "text" and rng.random() < 0.8:
        return _text(rng, seed)
    return _bytes(rng, seed, rng.choice(seeds))


def _place(rng: Random, size: int) -> int:
    """Headers lie at the begin or at the end: most places are near one of them."""
    if size == 0:
        return 0
    where = rng.random()
    if where < 0.5:
        return min(int(rng.expovariate(1 / 200)), size - 1)
    return max(0, size - 1 - int(rng.expovariate(1 / 200))) if where < 0.7 else rng.randrange(size)


def _bytes(rng: Random, seed: bytes, other: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        at, how = _place(rng, len(data)), rng.randrange(9)
        if how == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1 and data:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how in (2, 3):
            layout, bits = rng.choice((("<I", 32), ("<Q", 64), ("<H", 16)))
            number = struct.pack(layout, rng.choice(NUMBERS) % (1 << bits))
            data[at : at + len(number)] = number
        elif how == 4:
            del data[at : at + 1 + int(rng.expovariate(1 / 8))]
        elif how == 5:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 16)))
        elif how == 6:
            data[at:at] = data[at : at + rng.randint(1, 64)] * rng.randint(1, 8)
        elif how == 7:
            del data[at:]
        else:
            data[at:] = other[_place(rng, len(other)) :]
    return bytes(data)


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value of a document."""
    found, left = [], [root]
    while left:
        node = left.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            left.append(node[key])
    return found


def _copied(node: Any) -> Any:
    try:
        return copy.deepcopy(node)
    except RecursionError:
        return None


def change_tree(rng: Random, root: Any) -> Any:
    """Change one value of a document, in place; gives the new document."""
    places = _places(root)
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    how, other = rng.randrange(8), rng.choice(places)
    if how < 3:
        holder[key] = _copied(rng.choice(VALUES))
    elif how == 3 and type(holder[key]) in (int, float):
        holder[key] += rng.choice((1, -1, 4, -4, 16, 64))
    elif how == 4:
        del holder[key]
    elif how == 5:
        holder[key] = _copied(other[0][other[1]])
    elif how == 6 and isinstance(holder, dict):
        holder[rng.choice(("", "x", str(key) + "s", "y" * 5000))] = holder.pop(key)
    elif isinstance(holder, list):
        most = VALUES_MORE // (1 + len(_places(holder[key])))
        holder.extend(_copied(holder[key]) for _ in range(min(most, rng.choice((1, 3, 2000)))))
    else:
        value = holder[key]
        for _ in range(rng.choice((1, 3, 70, 900))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        holder[key] = value
    return root


def _tree(rng: Random, seed: bytes) -> bytes:
    root = json.loads(seed)
    for _ in range(rng.randint(1, 3)):
        root = change_tree(rng, root)
    try:
        return json.dumps(root).encode()
    except RecursionError:
        return seed


def _text(rng: Random, seed: bytes) -> bytes:
    lines = seed.decode().split("\n")
    for _ in range(rng.randint(1, 4)):
        at, how = rng.randrange(len(lines)), rng.randrange(7)
        line = lines[at]
        column = rng.randint(0, len(line))
        if how == 0 and len(lines) > 1:
            del lines[at]
        elif how == 1:
            lines[at:at] = [line] * min(TEXT_MORE // (1 + len(line)), rng.choice((1, 1, 2, 3000)))
        elif how == 2:
            lines[at] = line[:column] + rng.choice(TOKENS) + line[column:]
        elif how == 3:
            lines[at] = line[:column] + rng.choice(TOKENS) * rng.choice((1, 5, 400))
        elif how == 4:
            lines[at] = "".join(str(rng.choice(NUMBERS)) if char.isdigit() and rng.random() < 0.3 else char for char in line)
        elif how == 5:
            lines[at] = rng.choice(lines)
        else:
            lines[at] = " " * rng.choice((1, 2, 4, 500)) + line
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _safetensors(rng: Random, seed: bytes) -> bytes:
    """The header's tree, its length or its bytes."""
    length = int.from_bytes(seed[:8], "little")
    header, data = seed[8 : 8 + length], seed[8 + length :]
    if rng.random() < 0.3:
        return _bytes(rng, seed, seed)
    header = _tree(rng, header)
    size = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS) % (1 << 64)
    return size.to_bytes(8, "little") + header + (data if rng.random() < 0.9 else data[: rng.randint(0, len(data))])
