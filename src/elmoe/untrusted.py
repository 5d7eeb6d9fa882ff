"""The one way to read JSON and YAML that others wrote: bounded in size, depth and numbers, and every failure an ElmoeError.

A caller names the file (``where``), the error class of its package and the hint; what is wrong is then told in two lines.
YAML is read as YAML 1.2 reads it, with the lines of its values: a key that is there twice, ``0100``, ``1:40`` and tags are
refused, ``yes`` and dates are text.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from elmoe.errors import ElmoeError

Kind = TypeVar("Kind")
MAX_DEPTH = 64
"""Deepest nesting of lists and mappings."""
MAX_DIGITS = 40
"""Most digits of a whole number."""
MAX_YAML_BYTES = 1 << 20
"""Largest YAML file."""
MAX_YAML_NODES = 20_000
"""Most values of a YAML file, each use of an alias counted anew."""
_SHOWN = 200
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `|$)")


def short(text: object, most: int = _SHOWN) -> str:
    """Text for an error message: on one line, printable, not longer than ``most`` characters."""
    line = str(text)[: 4 * most]
    line = "".join(char if char.isprintable() else " " for char in line)
    line = " ".join(line.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def nearest(name: object, names: Iterable[str], hint: str) -> str:
    """What may have been meant by a name that is not among ``names``; without anything near, ``hint``."""
    wanted, known = str(name)[:100].lower().strip(), list(names)
    first = wanted.split(",", 1)[0].strip()
    if first != wanted and first in known:
        return f"give one name at a time, '{first}' first"
    if wanted in known:
        return f"did you mean '{wanted}'?"
    if "/" in wanted or wanted.endswith((".yaml", ".yml", ".json")):  # a file that is not there
        return hint
    near = [one for one in known if wanted and one.startswith(wanted)] or get_close_matches(wanted, known, 1, 0.6)
    return f"did you mean {' or '.join(repr(one) for one in near[:4])}?" if near else hint


def read_bytes(path: str | Path, error: type[ElmoeError], limit: int, what: str, hint: str | None = None) -> bytes:
    """The bytes of a file of at most ``limit`` bytes, without a byte order mark; ``what`` it should be, in words."""
    try:
        path = Path(path)
        with path.open("rb") as file:
            if stat.S_ISREG(path.stat().st_mode) and path.stat().st_size > limit:
                raise error(f"'{path}' {_above(limit)}: it is no {what}", hint)
            raw = file.read(limit + 1)
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the name
        raise error(f"cannot read '{short(path)}': {getattr(reason, 'strerror', None) or reason}", hint) from None
    if len(raw) > limit:
        raise error(f"'{path}' {_above(limit)}: it is no {what}", hint)
    return raw.removeprefix(b"\xef\xbb\xbf")


def read_text(path: str | Path, error: type[ElmoeError], limit: int, what: str, hint: str | None = None) -> str:
    """A file of UTF-8 text; see :func:`read_bytes`. ``hint``: where it is none."""
    return text_of(read_bytes(path, error, limit, what), str(path), error, hint)


def text_of(raw: bytes, where: str, error: type[ElmoeError], hint: str | None = None) -> str:
    """Bytes as UTF-8 text."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"'{where}' is not text in UTF-8: {reason}", hint) from None


def load_json(
    raw: bytes | str, where: str, error: type[ElmoeError], hint: str | None = None, *, repeated_keys: bool = False,
    non_finite: bool = True,
) -> Any:  # fmt: skip
    """JSON of unknown shape. ``repeated_keys``: take the last of equal keys, as Python does, in place of refusing them.
    ``non_finite``: take NaN, Infinity and 1e999, as configurations of models hold them."""
    text = text_of(raw, where, error, hint) if isinstance(raw, bytes) else raw
    if text.startswith("version https://git-lfs"):
        raise error(
            f"'{where}' is a Git LFS pointer: the file itself was not downloaded", "run `git lfs pull` in its folder"
        )

    def number(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits)

    def constant(name: str) -> float:
        if not non_finite:
            raise ValueError(f"{name} is no JSON number")
        return float(name)

    hook = None if repeated_keys else _unique
    try:
        data = json.loads(text, parse_int=number, parse_constant=constant, object_pairs_hook=hook)
        _check(data, non_finite)
    except RecursionError:
        raise error(f"'{where}' is nested deeper than {MAX_DEPTH}", hint) from None
    except ValueError as reason:
        raise error(f"'{where}' is not JSON: {short(reason)}", hint) from None
    return data


def load_object(
    raw: bytes | str, where: str, error: type[ElmoeError], hint: str | None = None, *, repeated_keys: bool = False,
    non_finite: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """A JSON object of unknown keys; see :func:`load_json`."""
    data = load_json(raw, where, error, hint, repeated_keys=repeated_keys, non_finite=non_finite)
    if not isinstance(data, dict):
        raise error(f"'{where}' holds no JSON object", hint)
    return data


def decode_json(
    raw: bytes, where: str, kind: type[Kind], error: type[ElmoeError], what: str, hint: str | None = None
) -> Kind:
    """JSON as the type ``kind``; errors, those of its own checks too, say that ``where`` is ``what``: "no locality"."""
    try:
        load_json(raw, where, error, hint, non_finite=False)
    except error as reason:
        raise error(f"{reason}; it is {what}", reason.hint) from None
    try:
        return msgspec.json.decode(raw, type=kind)
    except (ElmoeError, ValueError, OverflowError, TypeError, RecursionError) as reason:
        raise error(f"'{where}' is {what}: {short(reason)}", hint) from reason


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice}' is there twice")
    return data


def _check(data: Any, non_finite: bool) -> None:
    """RecursionError above ``MAX_DEPTH``, ValueError for text that is no Unicode (half of a surrogate pair)."""
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for node in level:
            if type(node) is dict:
                below.extend(node)
                below.extend(node.values())
            elif type(node) is list:
                below.extend(node)
            elif type(node) is str and not node.isascii():
                node.encode()
            elif type(node) is float and not non_finite and not math.isfinite(node):
                raise ValueError("a number is too large")
        if not below:
            return
        level = below
    raise RecursionError


def _above(limit: int) -> str:
    return f"is larger than {limit >> 20} MiB" if limit >= 1 << 20 else f"has more than {limit} bytes"


@dataclass(frozen=True)
class Described:
    """A YAML file's ``data``, and the ``lines`` (from 1) of its values by path: ``$.main.bandwidth``, ``$.rows[0]``."""

    data: Any
    where: str
    lines: dict[str, int] = field(default_factory=dict)

    def at(self, path: str) -> str:
        """The file and the line of a path, or of the nearest value around it."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return f"'{self.where}', line {self.lines.get(path, 1)}"

    def convert(self, kind: type[Kind], error: type[ElmoeError], hint: str, dec_hook: Any = None) -> Kind:
        """As the type ``kind``; ``error`` names the file, the line and the path."""
        try:
            return msgspec.convert(self.data, kind, dec_hook=dec_hook)
        except (ElmoeError, ValueError, OverflowError, TypeError, RecursionError) as reason:
            found, unknown = re.search(r" - at `(\$[^`]*)`$", str(reason)), _UNKNOWN.match(str(reason))
            path = found.group(1) if found else "$"
            key = f"{path}.{unknown.group(1) if unknown else str(reason).split(' ', 1)[0]}"
            line = key if unknown or key in self.lines else path  # what is wrong often begins with its key
            raise error(f"{self.at(line)}: {short(reason, 600)}", hint) from reason


def load_yaml(text: str, where: str, error: type[ElmoeError], hint: str) -> Described:
    """YAML of unknown shape, with the lines of its values; ``error`` names the file and the line."""
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise error(f"'{where}' {_above(MAX_YAML_BYTES)}", hint)
    try:
        node = yaml.compose(text, _loader())
        reader = _YamlReader(where, error, hint)
        return Described(reader.value(node, "$", 0), where, reader.lines)
    except yaml.MarkedYAMLError as reason:
        mark = reason.problem_mark or reason.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        what = " ".join(filter(None, (reason.context, reason.problem)))
        raise error(f"'{where}'{line} is not YAML: {short(what)}", hint) from None
    except (yaml.YAMLError, ValueError) as reason:
        raise error(f"'{where}' is not YAML: {short(reason)}", hint) from None
    except RecursionError:
        raise error(f"'{where}' is nested deeper than {MAX_DEPTH}", hint) from None


def _loader() -> Any:
    """The loader that composes nodes and stops early at many of them; the C loader overflows its stack on deep files."""
    import yaml

    class Loader(yaml.SafeLoader):
        composed = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.composed += 1
            if self.composed > MAX_YAML_NODES:
                raise ValueError(f"more than {MAX_YAML_NODES} values")
            return super().compose_node(parent, index)

    return Loader


_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?=\.?[0-9])(?:0|[1-9][0-9]*)?(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?")
_MAX_KEY = 200
"""Longest key of a YAML mapping."""


class _YamlReader:
    """Nodes to data: lists, dicts with text keys, text, whole numbers, finite floats, booleans and None."""

    def __init__(self, where: str, error: type[ElmoeError], hint: str) -> None:
        self.where, self.error, self.hint = where, error, hint
        self.lines: dict[str, int] = {}
        self.count = 0

    def fail(self, node: Any, path: str, what: str) -> NoReturn:
        line = node.start_mark.line + 1
        raise self.error(f"'{self.where}', line {line}: {what} - at `{short(path)}`", self.hint)

    def value(self, node: Any, path: str, depth: int) -> Any:
        """A node and all below it; aliases are expanded."""
        import yaml

        self.count += 1
        if node is None:
            return None
        if self.count > MAX_YAML_NODES or depth > MAX_DEPTH:
            self.fail(node, path, f"more than {MAX_YAML_NODES} values, or nested deeper than {MAX_DEPTH}")
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if node.tag not in (_TAG + "seq", _TAG + "map"):
            self.fail(node, path, f"the tag '{short(node.tag.removeprefix(_TAG), 40)}' is not understood")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(node.value)]
        return dict(self.items(node, path, depth))

    def items(self, node: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
        """The pairs of a mapping; a key that is there twice is refused."""
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value if key_node.id == "scalar" else None
            if key is None or key == "<<" or len(key) > _MAX_KEY or self.scalar(key_node, path) != key:
                self.fail(key_node, path, f"the key '{short(key or 'of several values', 40)}' is not short plain text")
            if key in first:
                self.fail(key_node, path, f"the key '{short(key, 40)}' is there twice, first in line {first[key]}")
            first[key] = key_node.start_mark.line + 1
            yield key, self.value(value_node, f"{path}.{key}", depth + 1)

    def scalar(self, node: Any, path: str) -> Any:
        """Text that is quoted or looks like nothing else stays text."""
        import yaml

        text: str = node.value
        implied = yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], []) if node.style is None else []
        implied = implied + yaml.SafeLoader.yaml_implicit_resolvers.get(None, []) if node.style is None else []
        tag = next((tag for tag, pattern in implied if pattern.match(text)), _TAG + "str")
        if node.tag not in (tag, "!"):
            self.fail(node, path, f"the tag '{short(node.tag.removeprefix(_TAG), 40)}' is not understood")
        if tag == _TAG + "null":
            return None
        if text.lower() in ("true", "false") and tag == _TAG + "bool":
            return text.lower() == "true"
        if tag == _TAG + "int":
            if not _INTEGER.fullmatch(text) or len(text) > MAX_DIGITS:
                self.fail(node, path, f"'{short(text, 40)}' is not a plain decimal number; other programs read it otherwise")
            return int(text)
        if tag == _TAG + "float" or (node.style is None and _FLOAT.fullmatch(text)):
            if not _FLOAT.fullmatch(text) or len(text) > 4 * MAX_DIGITS or abs(float(text)) == float("inf"):
                self.fail(node, path, f"'{short(text, 40)}' is not a plain finite number")
            return float(text)
        return text
