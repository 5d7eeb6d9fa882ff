"""What a simulator needs to know of a model: its shapes and how many bytes each part has.

Read from published Hugging Face configurations (``config.json``) of Mixture-of-Experts families and of one dense family.
Norms, biases and attention sinks (below 0.1 % of the parameters) and next-token-prediction modules are not counted.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from elmoe.errors import HardwareError
from elmoe.schema.families import shapes_of_config
from elmoe.untrusted import load_object, read_bytes, short

_LIMITS = {
    "layers": 1024, "hidden": 1 << 20, "vocabulary": 1 << 24, "moe_layers": 1024, "dense_layers": 1024, "experts": 1 << 16,
    "top_k": 1 << 16, "expert_width": 1 << 22, "shared_width": 1 << 22, "dense_width": 1 << 22,
    "attention_parameters": 1 << 40, "kv_bytes_per_position": 1 << 24, "attention_width": 1 << 28,
}  # fmt: skip
_NEVER_ZERO = ("layers", "hidden", "vocabulary", "attention_parameters", "kv_bytes_per_position", "attention_width")


class Architecture(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Shapes of a decoder-only transformer with experts (or without: ``moe_layers`` 0).

    ``moe_layers`` and ``dense_layers`` count layers with experts and with one FFN of ``dense_width``, together ``layers``.
    ``shared_width``: the widths of a layer's shared experts, summed. ``attention_parameters``: weights of one layer's
    attention. ``kv_bytes_per_position``: one layer's cache of one position, fp16 (MLA: the compressed latent and the rotary
    key). ``attention_width``: multiply-accumulates of one layer per token and cached position, heads x (width of a score +
    width of a value); MLA in its absorbed form, both over the latent, as decoding from the compressed cache needs it.
    Sliding windows (GPT-OSS) are ignored: every layer is taken to attend to all positions.

    Bits per weight include scales: INT8 with a group-32 fp16 scale is 8.5, in an MSB slice of 4.5 and an LSB slice of 4.0;
    MXFP4 (GPT-OSS's experts) is 4.25 with no bit axis. Routers stay in fp32, as the engine keeps them.
    """

    name: str
    source: str
    layers: int
    hidden: int
    vocabulary: int
    moe_layers: int
    dense_layers: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    dense_width: int
    attention_parameters: int
    kv_bytes_per_position: int
    attention_width: int
    expert_bits: float = 8.5
    msb_bits: float = 4.5
    lsb_bits: float = 4.0
    dense_bits: float = 8.5
    router_bits: float = 32.0
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for field, most in _LIMITS.items():
            value, least = getattr(self, field), 1 if field in _NEVER_ZERO else 0
            if not least <= value <= most:
                raise HardwareError(f"model '{self.name}': {field} is {value}, expected {least} to {most}")
        if self.moe_layers + self.dense_layers != self.layers:
            raise HardwareError(
                f"model '{self.name}': {self.moe_layers} layers with experts and {self.dense_layers} dense ones "
                f"are not {self.layers} layers"
            )
        if self.moe_layers and not (1 <= self.top_k <= self.experts and self.expert_width):
            raise HardwareError(
                f"model '{self.name}': top {self.top_k} of {self.experts} experts of width {self.expert_width}"
            )
        if self.dense_layers and not self.dense_width:
            raise HardwareError(f"model '{self.name}': {self.dense_layers} dense layers, but their width is 0")
        bits = (self.expert_bits, self.msb_bits, self.dense_bits, self.router_bits)
        if not all(0 < width <= 64 for width in bits) or self.msb_bits + self.lsb_bits != self.expert_bits:
            raise HardwareError(
                f"model '{self.name}': msb_bits {self.msb_bits} and lsb_bits {self.lsb_bits} must sum to expert_bits "
                f"{self.expert_bits}, and every width lie in 0..64"
            )

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert: gate, up and down projection."""
        return 3 * self.hidden * self.expert_width

    @property
    def msb_bytes(self) -> float:
        """Bytes of one expert's MSB slice, with its scales."""
        return self.expert_parameters * self.msb_bits / 8

    @property
    def lsb_bytes(self) -> float:
        """Bytes of one expert's LSB slice; 0 without a bit axis."""
        return self.expert_parameters * self.lsb_bits / 8

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert, all its bits."""
        return self.expert_parameters * self.expert_bits / 8

    @property
    def router_parameters(self) -> int:
        """Weights of one layer's router."""
        return self.hidden * self.experts

    @property
    def shared_parameters(self) -> int:
        """Weights of one layer's shared experts, all of them."""
        return 3 * self.hidden * self.shared_width

    @property
    def dense_ffn_parameters(self) -> int:
        """Weights of a dense layer's FFN."""
        return 3 * self.hidden * self.dense_width

    @property
    def moe_layer_parameters(self) -> int:
        """Weights of a layer with experts that every token uses: attention, router and shared experts."""
        return self.attention_parameters + self.router_parameters + self.shared_parameters

    @property
    def dense_layer_parameters(self) -> int:
        """Weights of a dense layer: attention and FFN."""
        return self.attention_parameters + self.dense_ffn_parameters

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding table, and of the output head, each."""
        return self.vocabulary * self.hidden

    @property
    def moe_layer_bytes(self) -> float:
        """Bytes of ``moe_layer_parameters``."""
        shared = (self.attention_parameters + self.shared_parameters) * self.dense_bits
        return (shared + self.router_parameters * self.router_bits) / 8

    @property
    def dense_layer_bytes(self) -> float:
        """Bytes of ``dense_layer_parameters``."""
        return self.dense_layer_parameters * self.dense_bits / 8

    @property
    def head_bytes(self) -> float:
        """Bytes of the output head, which every token reads; the embedding table has as many (tied: it is the same)."""
        return self.embedding_parameters * self.dense_bits / 8

    @property
    def dense_bytes(self) -> float:
        """Bytes of all that is not an expert: layers, head, embedding table."""
        heads = self.head_bytes * (1 if self.tied_embeddings else 2)
        return self.moe_layers * self.moe_layer_bytes + self.dense_layers * self.dense_layer_bytes + heads

    @property
    def total_bytes(self) -> float:
        """Bytes of the whole model."""
        return self.dense_bytes + self.moe_layers * self.experts * self.expert_bytes

    @property
    def active_bytes(self) -> float:
        """Bytes of weights that decoding one token reads: one row of the embedding table, everything else dense, the head
        and the top-k experts of each layer."""
        layers = self.moe_layers * (self.moe_layer_bytes + self.top_k * self.expert_bytes)
        row = self.hidden * self.dense_bits / 8
        return layers + self.dense_layers * self.dense_layer_bytes + self.head_bytes + row

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one position's cache over all layers, fp16."""
        return self.layers * self.kv_bytes_per_position

    @property
    def parameters(self) -> int:
        """Weights of the whole model, both embeddings counted unless tied."""
        heads = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        moe = self.moe_layers * (self.moe_layer_parameters + self.experts * self.expert_parameters)
        return moe + self.dense_layers * self.dense_layer_parameters + heads

    @property
    def active_parameters(self) -> int:
        """Weights one token multiplies with, the head included, the embedding table not (publishers differ on it)."""
        moe = self.moe_layers * (self.moe_layer_parameters + self.top_k * self.expert_parameters)
        return moe + self.dense_layers * self.dense_layer_parameters + self.embedding_parameters


def architecture_of_config(config: dict[str, Any], name: str, source: str) -> Architecture:
    """From a Hugging Face configuration; ``name`` and ``source`` are kept, and ``source`` is what errors name.

    HardwareError for an unknown family (``model_type``), a missing key or an impossible size.
    """
    shapes = shapes_of_config(config, source)
    try:
        return Architecture(name=name, source=str(config.get("_source", source)), **shapes)
    except HardwareError as error:
        raise HardwareError(f"'{source}': {error}", error.hint) from None


def load_architecture(name_or_path: str | Path) -> Architecture:
    """A preset by name, a ``config.json``, or the folder of a checkpoint; HardwareError names the file and the key."""
    if str(name_or_path) in architecture_names():
        return architecture_of_config(_preset(str(name_or_path)), str(name_or_path), f"{name_or_path}.json")
    path = Path(name_or_path)
    names = f"a config.json, a folder that holds one, or one of {', '.join(architecture_names())}"
    try:
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise HardwareError(f"there is no model '{short(name_or_path)}'", names)
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        raise HardwareError(f"there is no model '{short(name_or_path)}'", names) from None
    config = _object(read_bytes(path, HardwareError, 1 << 20, "model's config.json", names), str(path))
    if config not in _preset_configs():
        config.pop("_source", None)  # a preset's source says nothing of a file that was changed
    return architecture_of_config(config, name_of_path(path), str(path))


@cache
def _preset_configs() -> tuple[dict[str, Any], ...]:
    return tuple(_preset(name) for name in architecture_names())


def _preset(name: str) -> dict[str, Any]:
    return _object((files("elmoe.presets") / "models" / f"{name}.json").read_bytes(), f"{name}.json")


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
def architecture_names() -> tuple[str, ...]:
    """Model presets, alphabetically."""
    folder = files("elmoe.presets") / "models"
    return tuple(sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")))


def _object(raw: bytes, where: str) -> dict[str, Any]:
    return load_object(raw, where, HardwareError, "expected a model's config.json", repeated_keys=True)
