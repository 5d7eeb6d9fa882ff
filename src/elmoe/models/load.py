"""Models by name: published configurations that come with the package, ``config.json`` files, checkpoints and stores."""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from elmoe.errors import ModelError
from elmoe.models import family_of, spec_of_config
from elmoe.models.described import SUFFIXES, described_names, described_text, model_of_description
from elmoe.models.sizes import ModelSizes
from elmoe.models.spec import ModelSpec
from elmoe.models.tensors import DEFAULT, FLOATS
from elmoe.untrusted import MAX_YAML_BYTES, load_object, nearest, read_bytes, read_text, short

_LARGEST_CONFIG, _LARGEST_MANIFEST = 1 << 20, 32 << 20


class _StoredLayer(msgspec.Struct, frozen=True):
    layer: int
    format: str


class _StoredTensor(msgspec.Struct, frozen=True):
    name: str
    format: str


class _Stored(msgspec.Struct, frozen=True):
    """What of a store's manifest says how large the model is."""

    model: ModelSpec
    layers: tuple[_StoredLayer, ...]
    tensors: tuple[_StoredTensor, ...] = ()

    @property
    def formats(self) -> dict[str, str]:
        """Format of every matrix and feed-forward that has not the default one."""
        found = {f"layers.{layer.layer}.experts": layer.format for layer in self.layers}
        return found | {one.name: one.format for one in self.tensors if one.format not in (DEFAULT, FLOATS)}


def load_model(name_or_path: str | Path) -> ModelSizes:
    """A preset by name, a ``config.json``, a description (``.yaml``), the folder of a checkpoint or of a store, or ``demo``,
    the store that comes with the package; ModelError names the file and the key."""
    if str(name_or_path) in model_names():
        return model_of_config(_preset(str(name_or_path)), str(name_or_path), f"{name_or_path}.json")
    if str(name_or_path) in described_names():
        return model_of_description(described_text(str(name_or_path)), f"{name_or_path}.yaml")
    path = Path(str(files("elmoe.presets") / "demo")) if str(name_or_path) == "demo" else Path(name_or_path)
    names = (*model_names(), *described_names())
    hint = f"a config.json, a description, a checkpoint, a store, or one of {', '.join(names)}"
    try:
        if path.is_dir() and (path / "manifest.json").is_file():
            return _model_of_store(path)
        path = path / "config.json" if path.is_dir() else path
        found = path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        found = False
    if not found:
        raise ModelError(f"there is no model '{short(name_or_path)}'", nearest(name_or_path, (*names, "demo"), hint))
    if path.suffix in SUFFIXES:
        return model_of_description(read_text(path, ModelError, MAX_YAML_BYTES, "description of a model", hint), str(path))
    config = _object(read_bytes(path, ModelError, _LARGEST_CONFIG, "model's config.json", hint), str(path))
    if config not in _preset_configs():
        config.pop("_source", None)  # a preset's source says nothing of a file that was changed
    return model_of_config(config, name_of_path(path), str(path))


def name_of_path(path: Path) -> str:
    """What a model is called by the path the user wrote, links not followed: the folder of a config.json, else the file.
    A snapshot in a Hugging Face cache has the name of its repository."""
    if path.name != "config.json":
        return path.stem
    folder = Path(os.path.abspath(path)).parent
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name or "/"


@cache
def _preset_configs() -> tuple[dict[str, Any], ...]:
    return tuple(_preset(name) for name in model_names())


def model_text(name: str) -> str:
    """A preset's config.json, to copy and change."""
    return (files("elmoe.presets") / "models" / f"{name}.json").read_text(encoding="utf-8")


def _preset(name: str) -> dict[str, Any]:
    return _object(model_text(name).encode(), f"{name}.json")


def model_of_config(config: dict[str, Any], name: str, where: str) -> ModelSizes:
    """From a Hugging Face configuration, in the formats of its family's published weights.

    ``where`` is what errors name, and the source if the configuration has no ``_source``.
    """
    spec = spec_of_config(config, where)
    return ModelSizes(
        spec=spec, name=name, source=str(config.get("_source", where)), formats=dict(family_of(config, where).formats)
    )


def _model_of_store(folder: Path) -> ModelSizes:
    path = folder / "manifest.json"
    raw = read_bytes(path, ModelError, _LARGEST_MANIFEST, "manifest of a store")
    name = Path(os.path.abspath(folder)).name
    try:
        stored = msgspec.json.decode(raw, type=_Stored)
        return ModelSizes(spec=stored.model, name=name, source=str(folder), formats=stored.formats)
    except (msgspec.MsgspecError, ModelError, ValueError, RecursionError) as error:
        raise ModelError(f"'{path}': {short(error)}", "it is no manifest of a store of this version") from None


@cache
def model_names() -> tuple[str, ...]:
    """Model presets, alphabetically."""
    folder = files("elmoe.presets") / "models"
    return tuple(sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")))


def _object(raw: bytes, where: str) -> dict[str, Any]:
    return load_object(raw, where, ModelError, "expected a model's config.json", repeated_keys=True)
