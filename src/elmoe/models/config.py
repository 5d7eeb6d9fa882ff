"""Typed reads of a Hugging Face ``config.json``: a value of another type or out of bounds is an error with file and key."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NoReturn

from elmoe.errors import ModelError
from elmoe.models.spec import MOST, LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling

_LARGEST = 1 << 31
ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "attention_multiplier": (), "attn_logit_softcapping": (), "clip_qkv": (), "embedding_multiplier": (1,),
    "final_logit_softcapping": (), "logits_scaling": (1,), "n_group": (0, 1), "norm_topk_prob": (True,),
    "position_embedding_type": ("rope",), "residual_multiplier": (1,), "routed_scaling_factor": (1,),
    "scoring_func": ("softmax",), "topk_group": (0, 1), "use_sliding_window": (False,),
}  # fmt: skip
"""Keys that change what some families compute though no tensor tells, and the values by which nothing changes."""
EXPERTS = "num_experts", "num_local_experts", "n_routed_experts"
"""One number under three names, as transformers takes them."""
PUBLISHED = "compare it with the config.json that the model was published with"
KEYS_OF = {
    "model.vocabulary": ("vocab_size",), "model.hidden": ("hidden_size",),
    "model.max_positions": ("max_position_embeddings",), "norm_epsilon": ("rms_norm_eps",),
    "attention.heads": ("num_attention_heads",), "attention.kv_heads": ("num_key_value_heads",),
    "attention.head_dim": ("head_dim",), "attention.window": ("sliding_window",), "attention.latent_rank": ("kv_lora_rank",),
    "attention.query_rank": ("q_lora_rank",), "attention.plain_dim": ("qk_nope_head_dim",),
    "attention.value_dim": ("v_head_dim",), "attention.score_scale": ("attention_multiplier",),
    "rope.dimensions": ("head_dim", "qk_rope_head_dim", "partial_rotary_factor"),
    "rope.theta": ("rope_theta",), "router.experts": EXPERTS,
    "router.scaling": ("routed_scaling_factor",), "router keeps": ("n_group", "topk_group", *EXPERTS),
    "router chooses": ("n_group", "topk_group", "num_experts_per_tok", *EXPERTS),
    "experts.width": ("moe_intermediate_size", "intermediate_size"),
    "experts.shared_width": ("shared_expert_intermediate_size", "shared_intermediate_size", "n_shared_experts"),
    "feed_forward.width": ("intermediate_size",), "activation": ("swiglu_limit",),
    "multipliers.embedding": ("embedding_multiplier",), "multipliers.residual": ("residual_multiplier",),
    "multipliers.logits": ("logits_scaling",),
}  # fmt: skip
"""What begins a message about a spec, and the keys that gave the value."""
Scaling = LinearScaling | Llama3Scaling | LongRopeScaling | YarnScaling | None


class _Asked(dict[str, Any]):
    """Values that remember which keys somebody asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of any dictionary."""
        self.keys_asked.add(key)
        return super().get(key, default)


class Config:
    """One configuration; null means absent, as in transformers. ``where`` names it in errors, ``advice`` is the hint of
    those that have none of their own."""

    def __init__(self, values: dict[str, Any], where: str = "config.json", advice: str = PUBLISHED) -> None:
        self.values = _Asked({key: value for key, value in values.items() if value is not None})
        self.where, self.advice = where, advice

    def check_elsewhere(self, family: str) -> None:
        """Refuse what means something in other families and was not asked for here, and experts that are counted twice."""
        values = dict(self.values)
        counts = {key: values[key] for key in EXPERTS if key in values}
        if len(set(map(repr, counts.values()))) > 1:
            told = " and ".join(f"'{key}' {_shown(value)}" for key, value in counts.items())
            self.fail(f"{told} disagree", "they are names of one number: leave one out")
        left = {key: value for key, value in values.items() if key not in self.values.keys_asked}
        for key in sorted(left.keys() & ELSEWHERE.keys()):
            value = left[key]
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in ELSEWHERE[key]):
                self.fail(f"'{key}' is {_shown(value)}, which the family {family} does not have", "leave it out")
        kinds = left.get("layer_types", [])
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            self.fail(f"'layer_types' is {_shown(kinds)}, which the family {family} does not have", "leave it out")

    def fail(self, what: str, hint: str | None = None) -> NoReturn:
        """Raise ModelError about this configuration."""
        raise ModelError(f"{self.where}: {what}", hint or self.advice)

    def hint(self, message: str, written: Container[str] | None = None) -> str:
        """Where to mend what a spec says of its own fields: the keys of this configuration that gave the value.

        :param written: keys that the file holds; None is those that are here.
        """
        about = max((about for about in KEYS_OF if message.startswith(about)), key=len, default=None)
        keys = (
            [f"'{key}'" for key in KEYS_OF[about] if key in (self.values if written is None else written)] if about else []
        )
        if about == "experts.width":  # the other one is that of dense layers
            keys = keys[:1]
        return f"{', '.join(keys)} {'say' if len(keys) > 1 else 'says'} so" if keys else self.advice

    def defaulted(self, **values: Any) -> Config:
        """The same configuration with ``values`` where a key is absent; what is asked of either counts as asked of both."""
        result = Config(values | dict(self.values), self.where, self.advice)
        result.values.keys_asked = self.values.keys_asked
        return result

    def has(self, key: str) -> bool:
        """Whether a key is there and not null."""
        return key in self.values

    def integer(self, *keys: str, default: int | None = None, least: int = 1, most: int = _LARGEST - 1) -> int:
        """The first of ``keys`` that is present, a whole number in ``least``..``most``."""
        key = next((key for key in keys if key in self.values), None)
        if key is None:
            if default is None:
                self.fail(f"there is no '{keys[0]}'" + "".join(f" (nor '{other}')" for other in keys[1:]))
            return default
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fail(f"'{key}' is {_shown(value)}, expected a whole number in {least}..{most}")
        return value

    def layers(self) -> int:
        """The number of layers, small enough to list them."""
        return self.integer("num_hidden_layers", most=MOST["layers"])

    def words(self, key: str, layers: int, allowed: Sequence[str]) -> tuple[str, ...] | None:
        """One of the ``allowed`` words for each of the layers, None where the key is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or any(word not in allowed for word in value):
            names = " or ".join(f"'{word}'" for word in allowed)
            self.fail(f"'{key}' must name {names} for each of the {layers} layers, not {_shown(value)}")
        return tuple(value)

    def windows(self, layers: int, default: Sequence[str]) -> tuple[int | None, ...]:
        """The window of each layer: ``sliding_window`` where ``layer_types`` (or else ``default``) name a sliding one."""
        kinds = self.words("layer_types", layers, ("full_attention", "sliding_attention")) or tuple(default)
        return tuple(self.integer("sliding_window") if kind == "sliding_attention" else None for kind in kinds)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.values.get(key, default)
        if value is None:
            self.fail(f"there is no '{key}'")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            self.fail(f"'{key}' is {_shown(value)}, expected a number above 0 and below 1e12")
        return float(value)

    def _unless_zero(self, key: str) -> float:
        """A positive number, or 0, which is the same as none."""
        value = self.values.get(key, 0)
        return 0.0 if value == 0 and not isinstance(value, bool) else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.fail(f"'{key}' is {_shown(value)}, expected true or false")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse another value than the allowed ones, the first of which is meant where the key is absent."""
        value = self.values.get(key, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            self.fail(f"'{key}' is {_shown(value)}", f"supported: {', '.join(repr(one) for one in allowed)}")

    def indices(self, key: str, layers: int) -> tuple[int, ...]:
        """A list of layers, perhaps empty or absent."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or any(isinstance(one, bool) or not isinstance(one, int) for one in value):
            self.fail(f"'{key}' is {_shown(value)}, expected a list of layers")
        if any(not 0 <= one < layers for one in value):
            self.fail(f"'{key}' names layers outside 0..{layers - 1}: {_shown(value)}")
        return tuple(sorted(set(value)))

    def tokens(self, key: str, vocabulary: int) -> tuple[int, ...]:
        """Token ids: one, a list, or none."""
        value = self.values.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < vocabulary for one in ids):
            self.fail(f"'{key}' is {_shown(value)}, not token ids in 0..{vocabulary - 1}")
        return tuple(dict.fromkeys(ids))

    def heads(self, hidden: int) -> tuple[int, int, int]:
        """Query heads, key and value heads, and their dimensions, by the keys that most families share."""
        heads, kv_heads = self.integer("num_attention_heads"), self.integer("num_key_value_heads")
        if heads % kv_heads:
            self.fail(f"'num_attention_heads' {heads} is no multiple of 'num_key_value_heads' {kv_heads}")
        if not self.has("head_dim") and hidden % heads:
            self.fail(f"there is no 'head_dim', and {heads} heads do not divide 'hidden_size' {hidden}")
        return heads, kv_heads, self.integer("head_dim", default=hidden // heads)

    def rope(
        self, head_dim: int, default_theta: float = 10000.0, interleaved: bool = False, partial: float | None = None
    ) -> Rope:
        """The rotary embedding of heads of ``head_dim``, in the spelling of transformers 4 (``rope_theta``,
        ``rope_scaling``) or 5 (``rope_parameters``); where both are present they must agree.

        :param partial: the family's rotated fraction of a head where the configuration has none; None where the family
            always rotates whole heads, and another fraction is refused.
        """
        thetas, scalings, fractions = [], [], []
        if self.has("rope_theta"):
            thetas.append(self.number("rope_theta"))
        if self.has("partial_rotary_factor"):
            fractions.append(self.number("partial_rotary_factor"))
        for key in ("rope_scaling", "rope_parameters"):
            values = self.values.get(key, {})
            if not isinstance(values, dict):
                self.fail(f"'{key}' is {_shown(values)}, expected an object", "supported: rope_type 'default'")
            if any(isinstance(value, dict) for value in values.values()):
                self.fail(f"'{key}' differs by the kind of layer, which is not supported: {_shown(values)}")
            inner = Config(values, f"{self.where}: {key}", self.advice)
            if inner.has("rope_theta"):
                thetas.append(inner.number("rope_theta"))
            if inner.has("partial_rotary_factor"):
                fractions.append(inner.number("partial_rotary_factor"))
            if values:
                scalings.append((key, inner.scaling(self)))
        if len(set(thetas)) > 1:
            self.fail(f"'rope_theta' has several values: {', '.join(f'{theta:g}' for theta in dict.fromkeys(thetas))}")
        if len(scalings) > 1 and scalings[0][1] != scalings[1][1]:
            both = ", ".join(_shown(self.values[key]) for key, _ in scalings)
            self.fail(f"'rope_scaling' and 'rope_parameters' disagree: {both}", "leave one out")
        fraction = fractions[0] if fractions else partial or 1.0
        if len(set(fractions)) > 1 or fraction > 1 or (partial is None and fraction != 1):
            found = ", ".join(f"{one:g}" for one in dict.fromkeys(fractions))
            self.fail(f"'partial_rotary_factor' is {found}", f"supported: {1 if partial is None else 'one value up to 1'}")
        return Rope(
            theta=thetas[0] if thetas else default_theta, dimensions=int(head_dim * fraction), interleaved=interleaved,
            scaling=scalings[0][1] if scalings else None,
        )  # fmt: skip

    def scaling(self, model: Config) -> Scaling:
        """A rope scaling from this object of the ``model``'s configuration; an unknown kind is refused by name."""
        kind = self.values.get("rope_type", self.values.get("type", "default"))
        if "rope_type" in self.values and "type" in self.values and self.values["type"] != kind:
            self.fail(f"'rope_type' {kind!r} and 'type' {self.values['type']!r} disagree")
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind == "default":
            result: Scaling = None
        elif kind == "linear":
            known.add("factor")
            result = LinearScaling(factor=self.number("factor"))
        elif kind == "llama3":
            known |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
            result = Llama3Scaling(
                factor=self.number("factor"), low_frequency_factor=self.number("low_freq_factor"),
                high_frequency_factor=self.number("high_freq_factor"), original_positions=self._original(model),
            )  # fmt: skip
        elif kind == "yarn":
            known |= {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
                      "original_max_position_embeddings"}  # fmt: skip
            result = self._yarn(model)
        else:
            self.fail(f"rope_type is {_shown(kind)}", "supported: default, linear, llama3, yarn")
        unknown = sorted(set(self.values) - known)
        if unknown:
            self.fail(f"{_shown(unknown[0])} is not a parameter of rope_type '{kind}'")
        return result

    def _original(self, model: Config) -> int:
        if self.has("original_max_position_embeddings"):
            return self.integer("original_max_position_embeddings")
        return model.integer("original_max_position_embeddings", "max_position_embeddings")

    def _yarn(self, model: Config) -> YarnScaling:
        """YaRN as ``transformers.modeling_rope_utils`` computes its attention factor, with DeepSeek's two ``mscale``."""
        from math import log

        factor = self.number("factor")

        def magnitude(mscale: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * mscale * log(factor) + 1.0

        mscale, all_dim = self._unless_zero("mscale"), self._unless_zero("mscale_all_dim")
        if self.has("attention_factor"):
            attention = self.number("attention_factor")
        elif mscale and all_dim:
            attention = magnitude(mscale) / magnitude(all_dim)
        else:
            attention = magnitude(1.0)
        return YarnScaling(
            factor=factor, original_positions=self._original(model), beta_fast=self.number("beta_fast", 32.0),
            beta_slow=self.number("beta_slow", 1.0), attention_factor=attention,
            score_factor=magnitude(all_dim) ** 2 if all_dim else 1.0, truncate=self.flag("truncate", True),
        )  # fmt: skip


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
