"""Files that appear when they are whole: written under another name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elmoe.errors import ElmoeError, HardwareError


class PartialFile:
    """A file that is written under the name ``partial`` until ``finish`` gives it the name ``path``.

    Call ``discard`` in every case at the end: it removes what was not finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")

    def finish(self, sync: bool = False) -> None:
        """Rename; ``sync`` puts the content on the disk before, so that a power cut leaves the old file or the new one."""
        if sync:
            with open(self.partial, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        """Remove the temporary file, if it is there."""
        with suppress(FileNotFoundError, NotADirectoryError):
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
            file.path.parent.mkdir(parents=True, exist_ok=True)
        yield file.partial
        file.finish(sync)
    except OSError as failure:
        raise error(f"cannot write '{path}': {failure.strerror or failure}", hint) from failure
    finally:
        file.discard()


def write_whole(path: str | Path, content: bytes, error: type[ElmoeError] = HardwareError) -> None:
    """Write a small file and the folders it is in; see :func:`whole_file`."""
    with whole_file(path, error, "choose another place", folders=True) as partial:
        partial.write_bytes(content)
