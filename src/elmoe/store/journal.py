"""The journal of a store that is being written: which files are finished, and who writes. It is locked by its process.

It lies in ``<store>.partial``. A folder of that name that no conversion made is refused and left as it is.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec

from elmoe.errors import ConvertError, RequestError
from elmoe.files import check_new_folder
from elmoe.store.format import DENSE_FILE, FileEntry, LayerEntry, TensorEntry

JOURNAL = "journal.jsonl"
_OURS = re.compile(r"journal\.jsonl|manifest\.json|dense\.bin|layer-\d{3,}\.experts|tokenizer\.json|chat_template\.jinja")
"""Names of the files in a folder that a conversion writes."""
_BEGIN = b'{"fingerprint":"'


class JournalLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished data file with its manifest entries; without a file, tensors of ``dense.bin`` that are on the disk. The
    first line holds the fingerprint of the source instead."""

    fingerprint: str | None = None
    file: FileEntry | None = None
    tensors: tuple[TensorEntry, ...] = ()
    layer: LayerEntry | None = None


class Journal:
    """The journal of the store ``path``, created and locked. A context manager that lets go of the lock.

    ``partial``: the folder that is written. ``lines``: those of the finished files.

    :raises ConvertError: the store exists, its place cannot be written, another process writes it, or the folder is the
        user's own.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, list[JournalLine]()
        self.partial = path.with_name(path.name + ".partial")
        if os.path.lexists(path):
            raise ConvertError(f"'{path}' exists already", "remove it or choose another name")
        try:
            check_new_folder(path, "store")
        except RequestError as error:
            raise ConvertError(str(error), error.hint) from None
        new = self._check_folder()
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.partial / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise ConvertError(f"cannot write '{path}': {error.strerror}") from error
        try:
            self._lock()
        except BaseException:
            self.close()
            raise
        if os.path.lexists(path):  # another conversion has finished since
            if new:
                self.discard()
            self.close()
            raise ConvertError(f"'{path}' exists already", "remove it or choose another name")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock; the files stay."""
        handle, self._handle = getattr(self, "_handle", -1), -1
        if handle >= 0:
            os.close(handle)

    def _check_folder(self) -> bool:
        """Whether the folder is new or empty; ConvertError if it holds what no conversion wrote."""
        foreign = f"'{self.partial}' exists, and no conversion made it"
        try:
            names = set(os.listdir(self.partial))
        except FileNotFoundError:
            return True
        except OSError as error:
            raise ConvertError(f"cannot write '{self.path}': {error.strerror}") from error
        others = sorted(name for name in names if not _OURS.fullmatch(name))
        journal = self.partial / JOURNAL
        if others or (names and (JOURNAL not in names or journal.is_symlink() or not journal.is_file())):
            raise ConvertError(foreign, "move it away, or choose another name for the store")
        if names:
            with journal.open("rb") as file:
                begin = file.read(len(_BEGIN))
            if not _BEGIN.startswith(begin):
                raise ConvertError(foreign, "move it away, or choose another name for the store")
        return not names

    def _lock(self) -> None:
        busy = f"'{self.path}' is being written by another conversion"
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.stat(self.partial / JOURNAL)
        except (BlockingIOError, FileNotFoundError):
            raise ConvertError(busy, "wait for its end, or choose another name") from None
        except OSError as error:
            raise ConvertError(f"cannot lock '{self.partial / JOURNAL}': {error.strerror}", "choose another disk") from error
        if not os.path.samestat(found, os.fstat(self._handle)):
            raise ConvertError(busy, "wait for its end, or choose another name")

    def resume(self, fingerprint: str, holds: Callable[[JournalLine], bool]) -> None:
        """Keep the lines of what is as it was written (``holds``); begin anew for another source."""
        raw, found = os.pread(self._handle, os.fstat(self._handle).st_size, 0), []
        for text in raw.split(b"\n"):
            try:
                found.append(msgspec.json.decode(text, type=JournalLine))
            except (msgspec.DecodeError, RecursionError):
                break  # the line that was being written when the process died
        same = bool(found) and found[0].fingerprint == fingerprint
        self.lines = [found[0], *(line for line in found[1:] if (line.file or line.tensors) and holds(line))] if same else []
        kept = {line.file.name if line.file else DENSE_FILE for line in self.lines[1:]}
        for name in os.listdir(self.partial):
            if name != JOURNAL and name not in kept:
                os.unlink(self.partial / name)
        os.ftruncate(self._handle, 0)
        lines, self.lines = self.lines or [JournalLine(fingerprint=fingerprint)], []
        for line in lines:
            self.append(line)

    def append(self, line: JournalLine) -> None:
        """Add a line, and put it on the disk."""
        data = msgspec.json.encode(line) + b"\n"
        os.lseek(self._handle, 0, os.SEEK_END)
        while data:
            data = data[os.write(self._handle, data) :]
        os.fsync(self._handle)
        self.lines.append(line)

    def discard(self) -> None:
        """Remove a folder in which nothing is finished."""
        with suppress(OSError):
            os.unlink(self.partial / JOURNAL)
            self.partial.rmdir()

    def remove(self) -> None:
        """Remove the folder with all that is finished."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self) -> None:
        """Give the folder the name of the store. The journal goes after that: a folder without one cannot be resumed."""
        if os.path.lexists(self.path):
            raise ConvertError(f"'{self.path}' exists already", f"the store is whole in '{self.partial}'")
        os.rename(self.partial, self.path)
        sync_directory(self.path.parent)
        os.unlink(self.path / JOURNAL)
        self.close()


def sync_directory(path: Path) -> None:
    """Put the names in a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
