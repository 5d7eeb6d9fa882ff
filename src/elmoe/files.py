"""The one way to write a file: it appears when it is whole, links stay links, and pipes and devices are written through."""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elmoe.errors import ElmoeError, HardwareError, RequestError
from elmoe.untrusted import short


class PartialFile:
    """A file that is written under the name ``partial`` until ``finish`` gives it the name ``path``.

    A ``path`` that is a link is written where it points. One that exists and is no regular file, such as a pipe or a device,
    is written directly: ``partial`` is ``path`` then. Call ``discard`` in every case at the end: it removes what was not
    finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._target, self._mode = self.path, None
        with suppress(OSError, ValueError):  # whoever opens ``partial`` is told the reason
            self._target = Path(os.path.realpath(path))
            self._mode = self._target.stat().st_mode
        self.whole = self._mode is None or stat.S_ISREG(self._mode) or stat.S_ISDIR(self._mode)
        # Not the target's name with a suffix: that may be too long, or a file of the user's.
        partial = self._target.with_name(f".elmoe-{secrets.token_hex(8)}.partial")
        self.partial = partial if self.whole else self._target

    def finish(self, sync: bool = False) -> None:
        """Rename; ``sync`` puts the content on the disk before, so that a power cut leaves the old file or the new one."""
        if not self.whole:
            return
        if sync:
            with open(self.partial, "rb") as handle:
                os.fsync(handle.fileno())
        if self._mode is not None and stat.S_ISREG(self._mode):
            with suppress(OSError):
                os.chmod(self.partial, stat.S_IMODE(self._mode))
        os.replace(self.partial, self._target)

    def discard(self) -> None:
        """Remove the temporary file, if it is there."""
        if self.whole:
            with suppress(OSError, ValueError):
                self.partial.unlink()


@contextmanager
def whole_file(
    path: str | Path, error: type[ElmoeError], hint: str | None = None, *, sync: bool = False, folders: bool = False
) -> Iterator[Path]:
    """Yield the temporary name to write under; on a clean exit ``path`` appears, otherwise nothing half-written stays.

    :param sync: see :meth:`PartialFile.finish`. :param folders: create the folders of ``path`` that are missing.
    :raises ElmoeError: an ``error`` with ``hint``, where the operating system refuses, here or in the caller's block.
    """
    file = PartialFile(path)
    try:
        if folders:
            file.partial.parent.mkdir(parents=True, exist_ok=True)
        yield file.partial
        file.finish(sync)
    except OSError as failure:
        raise error(f"cannot write '{short(path)}': {failure.strerror or failure}", hint) from failure
    finally:
        file.discard()


def write_whole(path: str | Path, content: bytes, error: type[ElmoeError] = HardwareError) -> None:
    """Write a small file and the folders it is in; see :func:`whole_file`."""
    with whole_file(path, error, "choose another place", folders=True) as partial:
        partial.write_bytes(content)


def check_output(path: str | Path | None, force: bool = False, what: str = "", folders: bool = False) -> None:
    """Before any work: RequestError where ``path`` cannot be written, or exists and ``force`` is off. ``what`` is written,
    in a word; ``folders``: those missing will be made."""
    if path is None:
        return
    shown = f"{what} '{short(path)}'".strip()
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise RequestError(f"cannot write {shown}: it is a folder", "name a file in it")
        if target.is_symlink():
            raise RequestError(f"cannot write {shown}: it is a link to itself", "remove the link")
        if target.exists() and not target.is_file():
            if not os.access(target, os.W_OK):
                raise RequestError(f"cannot write {shown}: permission denied")
            return
        if target.exists() and not force:
            raise RequestError(f"{shown} exists already", "add --force to replace it, or choose another name")
        while folders and not os.path.lexists(target.parent):
            target = target.parent
        if not target.parent.is_dir():
            raise RequestError(f"cannot write {shown}: there is no folder '{short(Path(path).parent)}'", "make it first")
        _probe(target)
        if len(os.fsencode(target.name)) > 255:
            raise RequestError(f"cannot write {shown}: the name has more than 255 bytes")
    except (OSError, ValueError) as reason:
        raise RequestError(f"cannot write {shown}: {_reason(reason)}", "choose another name") from None


def same_file(one: str | Path | None, other: str | Path | None) -> bool:
    """Whether two outputs would be one file, so that the first would be lost."""
    return one is not None and other is not None and os.path.realpath(one) == os.path.realpath(other)


def check_new_folder(path: str | Path, what: str) -> None:
    """Before any work: RequestError where a folder ``path`` cannot be made, under this name or its ``.partial``; one that
    exists is left to whoever makes it."""
    shown, path = f"{what} '{short(path)}'", Path(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise RequestError(f"cannot write {shown}: it is a link to nothing", "remove the link, or name the place itself")
    partial = path.with_name(path.name + ".partial")
    if os.path.lexists(partial) and (partial.is_symlink() or not partial.is_dir()):
        raise RequestError(f"cannot write {shown}: '{short(partial.name)}' beside it is no folder", "move that file away")
    if not os.path.exists(path) and not os.path.exists(partial):
        check_output(partial, what=what, folders=True)


def _probe(target: Path) -> None:
    """OSError where no file can be made beside ``target``."""
    file = PartialFile(target)
    try:
        file.partial.touch(exist_ok=False)
    finally:
        file.discard()


def json_text(data: Any, indent: int | None = None) -> str:
    """Strict JSON: what is not finite becomes null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def _reason(reason: OSError | ValueError) -> str:
    return str(getattr(reason, "strerror", None) or reason)
