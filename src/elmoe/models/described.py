"""A generic description of a model, for the simulator alone: sizes in place of a config.json of a family that elmoe knows.

It covers decoders of grouped-query attention and gated feed-forwards, dense or with experts. What it cannot say (recurrent
layers, latent attention) must not be forced into it: a model with latent attention is described as a config.json.
"""

from __future__ import annotations

import re
from importlib.resources import files

import msgspec

from elmoe.errors import ModelError
from elmoe.models.sizes import BITS, ModelSizes
from elmoe.models.spec import MOST, Dense, GroupedAttention, LayerSpec, ModelSpec, Moe, Router
from elmoe.untrusted import MAX_YAML_BYTES, load_yaml

FAMILY = "described"
SUFFIXES = (".yaml", ".yml")
PARTS = re.compile(r"\b(?:model|attention|router|experts|dense|feed_forward)\.(\w+)")
KEYS = {"experts.width": "expert_width", "feed_forward.width": "dense_width"}
"""Names that a specification has for keys of a description, where not only the part before the point differs."""
HINT = "copy a description: `elmoe simulate --show-preset phi-3.5-moe`"


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model. Widths are inner units; a layer with experts has ``shared_width`` beside the routed ones.

    ``dense_layers``: how many layers at the start have a feed-forward of ``dense_width`` in place of experts. ``window``:
    positions a token sees, itself included. ``global_every``: each so-many-th layer sees all positions instead, with
    ``global_kv_heads`` and ``global_head_dim`` where these differ. ``precision``: format of routed experts,
    ``dense_precision``: of everything else but routers.
    """

    name: str
    source: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    vocabulary: int
    shared_width: int = 0
    dense_layers: int = 0
    dense_width: int = 0
    window: int | None = None
    global_every: int = 0
    global_kv_heads: int = 0
    global_head_dim: int = 0
    tied_embeddings: bool = False
    precision: str = "nested8"
    dense_precision: str = "nested8"

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.source.strip():
            raise ModelError("name and source must not be empty")
        if not 1 <= self.layers <= MOST["layers"]:
            raise ModelError(f"layers is {self.layers}, allowed is 1..{MOST['layers']}")
        if not 0 <= self.dense_layers < self.layers:
            raise ModelError(f"dense_layers is {self.dense_layers}, allowed is 0..{self.layers - 1}")
        if bool(self.dense_layers) != bool(self.dense_width):
            raise ModelError("dense_layers and dense_width go together")
        if not 0 <= self.global_every <= self.layers or (self.global_every and self.window is None):
            raise ModelError("global_every is for a model with a window, and at most its layers")
        if (self.global_kv_heads or self.global_head_dim) and not self.global_every:
            raise ModelError("global_kv_heads and global_head_dim need global_every")
        for name in ("precision", "dense_precision"):
            if getattr(self, name) not in BITS:
                raise ModelError(f"{name} is '{getattr(self, name)[:40]}', allowed is {', '.join(BITS)}")

    def _global_attention(self) -> GroupedAttention:
        try:
            return GroupedAttention(
                heads=self.heads, kv_heads=self.global_kv_heads or self.kv_heads,
                head_dim=self.global_head_dim or self.head_dim, rope=None,
            )  # fmt: skip
        except ModelError as error:
            raise ModelError(re.sub(r"attention\.(kv_heads|head_dim)", r"attention.global_\1", str(error))) from error

    def spec(self) -> ModelSpec:
        """The layers; ModelError for sizes that are out of bounds or contradict each other."""
        near = GroupedAttention(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, rope=None, window=self.window
        )
        far = self._global_attention() if self.global_every else near
        moe = Moe(
            router=Router(experts=self.experts, top_k=self.top_k), width=self.expert_width, shared_width=self.shared_width
        )
        dense = Dense(width=self.dense_width) if self.dense_layers else moe
        return ModelSpec(
            family=FAMILY, vocabulary=self.vocabulary, hidden=self.hidden,
            layers=tuple(
                LayerSpec(
                    attention=far if self.global_every and (index + 1) % self.global_every == 0 else near,
                    feed_forward=dense if index < self.dense_layers else moe,
                )
                for index in range(self.layers)
            ),
            norm_epsilon=1e-6, max_positions=MOST["max_positions"], tied_embeddings=self.tied_embeddings,
        )  # fmt: skip


def described_names() -> tuple[str, ...]:
    """Presets of descriptions, alphabetically."""
    folder = files("elmoe.presets") / "described"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def described_text(name: str) -> str:
    """A preset's description, to copy and change."""
    return (files("elmoe.presets") / "described" / f"{name}.yaml").read_text(encoding="utf-8")


def model_of_description(text: str, where: str) -> ModelSizes:
    """The model of a YAML (or JSON) text; ModelError names ``where``, the line and the key."""
    if len(text) > MAX_YAML_BYTES:
        raise ModelError(f"'{where}' has more than {MAX_YAML_BYTES} bytes", HINT)
    described = load_yaml(text, where, ModelError, HINT)
    found = described.convert(Description, ModelError, HINT)
    try:
        spec = found.spec()
    except ModelError as error:
        told = PARTS.sub(lambda part: KEYS.get(part[0], part[1]), str(error))
        raise ModelError(f"{described.at(f'$.{told.split()[0]}')}: {told}", error.hint or HINT) from error
    formats = {"experts": found.precision, "matrices": found.dense_precision}
    return ModelSizes(spec=spec, name=found.name, source=found.source, formats=formats)
