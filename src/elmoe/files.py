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
from typing import Any, BinaryIO, cast

from elmoe.errors import ElmoeError, HardwareError, RequestError
from elmoe.untrusted import short


class WholeFile:
    """A file being written under another name beside its target; ``finish`` renames it, ``discard`` removes it.

    A target that is a link is written where it points. One that exists and is no regular file is written directly.

    :raises OSError: from every method, as the system reports it.
    """

    def __init__(self, path: str | Path) -> None:
        self.target = Path(os.path.realpath(path))
        self._partial: Path | None = None
        mode = None
        with suppress(FileNotFoundError):
            mode = self.target.stat().st_mode
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "it is a folder", str(path))
        if mode is not None and not stat.S_ISREG(mode):
            self.file: BinaryIO = cast(BinaryIO, open(self.target, "wb", buffering=0))  # noqa: SIM115
            return
        self._partial = self.target.with_name(f".elmoe-{secrets.token_hex(8)}.partial")
        handle = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if mode is not None:
            with suppress(OSError):
                os.fchmod(handle, stat.S_IMODE(mode))
        self.file = os.fdopen(handle, "wb")

    def finish(self) -> None:
        """Close, and give the file its name."""
        self.file.close()
        if self._partial is not None:
            os.replace(self._partial, self.target)
            self._partial = None

    def discard(self) -> None:
        """Close, and remove what was written; after ``finish`` this does nothing."""
        with suppress(OSError):
            self.file.close()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)


@contextmanager
def output(path: str | Path, error: type[ElmoeError] = HardwareError, hint: str | None = None) -> Iterator[BinaryIO]:
    """A binary file that appears when the block ends; on an exception nothing half-written stays. ``error`` if the system
    refuses."""
    whole = None
    try:
        whole = WholeFile(path)
        yield whole.file
        whole.finish()
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the name
        raise error(f"cannot write '{short(path)}': {_reason(reason)}", hint or "choose another name") from reason
    finally:
        if whole is not None:
            whole.discard()


def write_whole(path: str | Path, content: bytes, error: type[ElmoeError] = HardwareError) -> None:
    """Write a file that appears when it is whole, its folder too; ``error`` if that fails."""
    with suppress(OSError, ValueError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with output(path, error) as file:
        file.write(content)


def check_output(path: str | Path | None, force: bool = False, what: str = "") -> None:
    """Before any work: RequestError where ``path`` cannot be written, or exists and ``force`` is off. ``what`` is written,
    in a word."""
    if path is None:
        return
    shown = f"{what} '{short(path)}'".strip()
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise RequestError(f"cannot write {shown}: it is a folder", "name a file in it")
        if target.exists() and not target.is_file():
            if not os.access(target, os.W_OK):
                raise RequestError(f"cannot write {shown}: permission denied")
            return
        if target.exists() and not force:
            raise RequestError(f"{shown} exists already", "add --force to replace it, or choose another name")
        if not target.parent.is_dir():
            raise RequestError(f"cannot write {shown}: there is no folder '{short(Path(path).parent)}'", "make it first")
        WholeFile(target).discard()
        if len(os.fsencode(target.name)) > 255:
            raise RequestError(f"cannot write {shown}: the name has more than 255 bytes")
    except (OSError, ValueError) as reason:
        raise RequestError(f"cannot write {shown}: {_reason(reason)}", "choose another name") from None


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
