"""Models by name: published configurations that come with the package, ``config.json`` files, checkpoints and stores."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from elmoe.errors import ModelError
from elmoe.models import family_of, spec_of_config
from elmoe.models.sizes import ModelSizes
from elmoe.models.spec import ModelSpec

_LARGEST_CONFIG, _LARGEST_MANIFEST = 1 << 20, 256 << 20


class _StoredLayer(msgspec.Struct, frozen=True):
    layer: int
    format: str


class _Stored(msgspec.Struct, frozen=True):
    """What of a store's manifest says how large the model is."""

    model: ModelSpec
    layers: tuple[_StoredLayer, ...]


def load_model(name_or_path: str | Path) -> ModelSizes:
    """A preset by name, a ``config.json``, the folder of a checkpoint or of a store, or ``demo``, the store that comes with
    the package; ModelError names the file and the key."""
    if str(name_or_path) in model_names():
        text = (files("elmoe.presets") / "models" / f"{name_or_path}.json").read_text(encoding="utf-8")
        return model_of_config(_object(text, f"{name_or_path}.json"), str(name_or_path), f"{name_or_path}.json")
    path = Path(str(files("elmoe.presets") / "demo")) if str(name_or_path) == "demo" else Path(name_or_path)
    if path.is_dir() and (path / "manifest.json").is_file():
        return _model_of_store(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        names = ", ".join(model_names())
        raise ModelError(f"there is no model '{name_or_path}'", f"a config.json, a checkpoint, a store, or one of {names}")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ModelError(f"'{path}' is larger than 1 MiB", "a model's config.json is a few KB")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"'{path}' is not text: {error}", "expected a model's config.json") from None
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return model_of_config(_object(text, str(path)), name, str(path))


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
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise ModelError(f"'{path}' is larger than {_LARGEST_MANIFEST >> 20} MiB", "it is no manifest of a store")
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
        formats = {f"layers.{layer.layer}.experts": layer.format for layer in stored.layers}
        return ModelSizes(spec=stored.model, name=folder.resolve().name, source=str(folder), formats=formats)
    except (msgspec.MsgspecError, ModelError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"'{path}': {error}", "it is no manifest of a store of this version") from None


@cache
def model_names() -> tuple[str, ...]:
    """Model presets, alphabetically."""
    folder = files("elmoe.presets") / "models"
    return tuple(sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")))


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"'{where}' is not JSON: {error}", "expected a model's config.json") from None
    if not isinstance(data, dict):
        raise ModelError(f"'{where}' is not a JSON object", "expected a model's config.json")
    return data
