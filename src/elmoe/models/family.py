"""What one family of models knows: how its configuration becomes a spec, and what its checkpoints call their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from elmoe.models.config import Config
from elmoe.models.spec import ModelSpec

Names = Mapping[str, str]
"""Role of a tensor (see ``models.tensors``) -> name template with ``{layer}`` and ``{expert}``."""


@dataclass(frozen=True)
class GgufFamily:
    """The family in GGUF files.

    ``keys``: key of config.json -> metadata key behind the architecture's name; ``required`` of them must be there.
    ``fixed``: metadata that must have one of these values where it is present; without it a file means the first.
    ``config``: what config.json would say beside ``keys``, by the metadata; its ``rope_scaling`` counts where the file's is
    YaRN. ``names``: see :data:`Names`; experts are stacked in one tensor.
    ``recognise``: tells families of one architecture apart. ``metadata``: what export writes; it raises ModelError for a
    spec that GGUF cannot describe. ``neighbours``: roles whose rows are so ordered within a head that the rotary embedding
    pairs neighbours (2i, 2i + 1), where the checkpoint and the store pair halves. ``flags``: key of config.json that is true
    or false -> role of the tensor of the first layer that tells. ``further``: metadata key of the number of layers that
    predict further tokens, which ``block_count`` includes.
    """

    architecture: str
    keys: Mapping[str, str]
    required: tuple[str, ...]
    names: Names
    metadata: Callable[[ModelSpec], dict[str, int | float | str]]
    fixed: Callable[[ModelSpec], Mapping[str, tuple[Any, ...]]] = lambda spec: {}
    config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda metadata: {}
    recognise: Callable[[Mapping[str, Any]], bool] = lambda metadata: True
    neighbours: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    further: str | None = None


@dataclass(frozen=True)
class Family:
    """One family. ``name``: ``model_type`` in config.json; ``architectures``: its ``architectures``; ``names``: see
    :data:`Names`; None where no checkpoint can be converted yet, and the simulator alone reads the family. ``formats``:
    those of its published weights that are not the default ones of ``models.sizes``. ``alternating``: what the names of
    tensors begin with that hold all experts of a layer, rows of gates and ups in alternation."""

    name: str
    architectures: tuple[str, ...]
    read_config: Callable[[Config], ModelSpec]
    names: Names | None = None
    gguf: GgufFamily | None = None
    formats: Mapping[str, str] = field(default_factory=dict)
    alternating: str | None = None
