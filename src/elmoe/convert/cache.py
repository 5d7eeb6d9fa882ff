"""Models that were given as a GGUF file or a Hugging Face folder: converted once into a cache, and found again there.

A cache is a folder with one folder for each source: ``entry.json``, which tells of it, and the store, which appears when it
is whole. A store's name ends with a digest of its source's identity: whatever happens to other files, a store is never taken
for that of another source. A killed conversion is resumed by the next start; a source that has changed is converted anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from elmoe.convert.identity import Identity, difference, identity, is_source, printable
from elmoe.errors import ConvertError, NumericsError, StoreError
from elmoe.files import write_whole
from elmoe.units import format_bytes
from elmoe.untrusted import short

if TYPE_CHECKING:
    from elmoe.convert.source import Source

RECIPE = 2
"""How sources are converted. Raised when the same source gives another store: what is cached is then converted anew."""
ENTRY = "entry.json"
LONGEST_NAME = 80
"""Characters of a source's name in the name of its folder and of its store."""
UNREADABLE = "(its entry cannot be read)"
Bar = Callable[[str, float], AbstractContextManager[Callable[..., None]]]
"""A progress bar: takes a description and the bytes of the whole, yields a function of the bytes done."""


@dataclass(frozen=True)
class Telling:
    """Where a conversion tells of itself: ``line`` takes lines, ``bar`` makes progress bars."""

    line: Callable[[str], None]
    bar: Bar


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A source in the cache. ``path``: where it was; ``name``: of the store; ``identity``: see ``convert.identity``;
    ``made``: when, UTC."""

    path: str
    name: str
    identity: Identity
    recipe: int = RECIPE
    made: str = ""


@dataclass(frozen=True)
class Cached:
    """An entry on disk. ``bytes``: of all its files, unfinished ones too."""

    folder: Path
    entry: Entry
    bytes: int

    @property
    def store(self) -> Path:
        """Where its store is."""
        return self.folder / self.entry.name

    @property
    def whole(self) -> bool:
        """Whether the conversion has finished."""
        return is_whole(self.store)


def is_whole(store: Path) -> bool:
    """Whether a store is there."""
    return (store / "manifest.json").is_file()


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/elmoe/stores``; a relative path there does not count."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "elmoe" / "stores"


def stored(model: str | Path, folder: Path | None = None, telling: Telling | None = None) -> str | Path:
    """The store of a GGUF file (the first of a split one) or a Hugging Face folder, converted unless it is in the cache
    ``folder``; any other name as it is.

    :raises ConvertError: the source is damaged or not supported, or the cache cannot be written.
    """
    path = Path(model)
    if str(model) == "demo" or not is_source(path):
        return model
    root, source = folder or default_folder(), Path(os.path.realpath(path))
    if path.suffix.lower() == ".gguf" and source.suffix.lower() != ".gguf":
        source = Path(os.path.abspath(path))  # a link to a blob: its own name tells of the parts
    found = identity(source)
    digest = hashlib.blake2b(json.dumps([RECIPE, found], sort_keys=True).encode(), digest_size=8).hexdigest()
    place = root / f"{_plain(source.name)}-{hashlib.blake2b(os.fsencode(source), digest_size=6).hexdigest()}"
    store = place / f"{_plain(source.stem if source.is_file() else source.name)}-{digest}"
    if is_whole(store):
        return store
    old = read_entry(place)
    for other in entries(root) if old is None else ():  # the source may have been moved
        if other.whole and other.store.name.endswith(f"-{digest}"):
            return other.store
    return _convert(source, store, found, old, telling or _telling())


@contextmanager
def naming_mend(model: str | Path, store: str | Path) -> Iterator[None]:
    """Errors of a store that ``stored`` found for a model say how to have it converted anew."""
    try:
        yield
    except StoreError as error:
        if Path(store) == Path(model):
            raise
        raise StoreError(str(error), f"elmoe cache remove {Path(store).name}: the next start converts it anew") from error


def _convert(source: Path, store: Path, found: Identity, old: Cached | None, telling: Telling) -> Path:
    """Convert a source into its store in the cache, after saying why and what it takes."""
    from elmoe.convert.convert import convert_source, left_out_lines, texts_of
    from elmoe.convert.source import open_source
    from elmoe.store.reader import MemoryReader

    model, place = open_source(source), store.parent
    model.check()
    texts_of(model)  # what cannot be used is told before the cache has anything of it
    _say(source, place, model, old, found, telling)
    hint = "choose another folder with --store-dir"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if is_whole(store):  # another process was faster
            return store
        if store.exists():  # damaged
            shutil.rmtree(store)
    except OSError as error:
        raise ConvertError(f"cannot write the cache '{place}': {error.strerror}", hint) from error
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    entry = Entry(path=printable(str(source)), name=store.name, identity=found, recipe=RECIPE, made=made)
    write_whole(place / ENTRY, msgspec.json.format(msgspec.json.encode(entry), indent=1), ConvertError)
    try:
        with telling.bar("converting", model_bytes(model)) as bar:
            convert_source(model, store, written=lambda done, total: bar(done, total))
        with telling.bar("verifying", model_bytes(model)) as bar, MemoryReader(store) as reader:
            reader.verify(bar)
            bar(model_bytes(model))  # headers and padding
    except StoreError as error:
        shutil.rmtree(store, ignore_errors=True)
        raise ConvertError(f"what was written to '{store}' cannot be read back: {error}", hint) from error
    except NumericsError:  # nothing of the store is kept: another attempt would stop there too
        if os.listdir(place) == [ENTRY]:
            shutil.rmtree(place, ignore_errors=True)
        raise
    except ConvertError as error:
        if "more of disk" in str(error):
            raise ConvertError(str(error), f"free some disk, or {hint}") from error
        raise
    if old is not None and old.entry.name != store.name:  # of the source as it was; what stays of it is only disk
        for left in (old.store, old.store.with_name(old.store.name + ".partial")):
            shutil.rmtree(left, ignore_errors=True)
    for line in (*left_out_lines(model.left_out), *model.losses.lines()):
        telling.line(line)
    return store


def model_bytes(model: Source) -> int:
    """Bytes of the store of a source."""
    from elmoe.store.layout import store_bytes

    return store_bytes(model.spec, model.formats)


def _say(source: Path, place: Path, model: Source, old: Cached | None, found: Identity, telling: Telling) -> None:
    """Say why a source is converted, and what it takes."""
    why = f"'{source.name}' is converted once"
    if old is not None and old.entry.identity != found:
        why = f"'{source.name}' has changed ({difference(old.entry.identity, found)}) and is converted anew"
    elif old is not None and old.entry.recipe != RECIPE:
        why = f"'{source.name}' was converted by another version of elmoe and is converted anew"
    elif old is not None:
        why = f"the conversion of '{source.name}' goes on where it stopped"
    size, seconds = model_bytes(model), model.seconds()
    about = f"{max(2, seconds):.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    telling.line(
        f"{why}: {format_bytes(size)} of disk in '{place}', about {format_bytes(model.memory())} of memory, about {about}"
    )


def read_entry(folder: Path) -> Cached | None:
    """An entry of a cache; None where the folder is none, or not readable."""
    with suppress(OSError, msgspec.MsgspecError, ValueError):
        entry = msgspec.json.decode((folder / ENTRY).read_bytes(), type=Entry)
        if _plain(entry.name, len(entry.name)) == entry.name:
            return Cached(folder, entry, _bytes_of(folder))
    return None


def entries(folder: Path | None = None) -> Iterator[Cached]:
    """All entries of a cache, by name; those that cannot be read, too, so that they can be removed. Links are none."""
    root = folder or default_folder()
    names: list[str] = []
    with suppress(OSError):
        names = sorted(os.listdir(root))
    for name in names:
        place = root / name
        if not place.is_symlink() and (place / ENTRY).is_file():
            damaged = Entry(path=UNREADABLE, name="unreadable", identity={})
            yield read_entry(place) or Cached(place, damaged, _bytes_of(place))


def _bytes_of(folder: Path) -> int:
    """Of the files that are there; others may come and go meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def remove(name: str, folder: Path | None = None) -> list[Cached]:
    """Remove the entries whose store, folder or source has this name or path; ConvertError where there is none."""
    wanted = os.path.abspath(name)
    found = [
        one
        for one in entries(folder)
        if name in (one.entry.name, one.folder.name, Path(one.entry.path).name) or printable(wanted) == one.entry.path
    ]
    if not found:
        raise ConvertError(f"the cache has no '{short(name)}'", "elmoe cache list shows what it has")
    for one in found:
        try:
            shutil.rmtree(one.folder)
        except OSError as error:
            raise ConvertError(f"cannot remove '{one.folder}': {error.strerror or error}") from error
    return found


def _plain(name: str, longest: int = LONGEST_NAME) -> str:
    """A name without characters that a shell or a manifest would stumble over, cut where it is long."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:longest] or "_"


def _telling() -> Telling:
    """On standard error."""
    import sys

    from elmoe.terminal import progress_bar, shown

    def line(text: str) -> None:
        with suppress(OSError, ValueError):
            print(shown(text), file=sys.stderr, flush=True)

    return Telling(line, lambda description, total: progress_bar(description, total, bytes_=True, rate=True))
