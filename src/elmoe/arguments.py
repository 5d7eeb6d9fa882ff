"""Keywords of the Python API: unknown names and wrong types are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from elmoe.errors import RequestError
from elmoe.untrusted import nearest, short

T = TypeVar("T")


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """RequestError for a name of ``given`` that is not ``known``, with the nearest one."""
    names = list(known)
    for name in given:
        if name not in names:
            hint = nearest(name, names, f"there are {', '.join(names)}")
            raise RequestError(f"there is no {what} '{short(name, 60)}'", hint)


def with_arguments(base: T, given: Mapping[str, Any], what: str) -> T:
    """A copy of the dataclass ``base`` with some fields changed.

    :param what: what a field is called in errors, such as ``sampling parameter``.
    :raises RequestError: an unknown name, or a value of the wrong type.
    """
    refuse_unknown(given, [field.name for field in fields(base)], what)  # type: ignore[arg-type]
    return replace(base, **given)  # type: ignore[type-var]


def check_types(values: Any, what: str) -> None:
    """RequestError naming the first field of a dataclass whose value is not of its type. NumPy's numbers become Python's."""
    for name, hint in get_type_hints(type(values)).items():
        given = getattr(values, name)
        value = without_numpy(given)
        if value is not given:
            object.__setattr__(values, name, value)  # the dataclass may be frozen
        told = f"expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}"
        if _plain(value):
            try:
                msgspec.convert(value, hint)
                continue
            except msgspec.ValidationError as error:
                told = str(error).replace("`", "")
        elif _is_instance(value, hint):
            continue
        choices = list(_choices(hint))
        hint_text = f"use {', '.join(map(str, choices))}" if choices else told[:1].lower() + told[1:]
        raise RequestError(f"the {what} {name} is {short(repr(value), 60)}", hint_text)


def without_numpy(value: Any) -> Any:
    """Numbers of NumPy, also within lists, tuples and dictionaries, as Python's; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict) and any(isinstance(one, np.generic) for pair in value.items() for one in pair):
        return {without_numpy(key): without_numpy(one) for key, one in value.items()}
    if type(value) in (list, tuple) and any(isinstance(one, np.generic) for one in value):
        return type(value)(map(without_numpy, value))
    return value


def _is_instance(value: Any, hint: Any) -> bool:
    """Whether an object that is no plain data is of a class that is asked for."""
    if hint is Any:
        return True
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    classes = [get_origin(kind) or kind for kind in kinds]
    return any(isinstance(kind, type) and isinstance(value, kind) for kind in classes)


def _choices(hint: Any) -> Iterator[Any]:
    """The values of a Literal, or of a union of them."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from _choices(part)


def _plain(value: Any) -> bool:
    """Whether a value is plain data."""
    return value is None or isinstance(value, (str, int, float, list, tuple, dict, bytes))
