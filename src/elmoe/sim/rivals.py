"""Which rivals a result compares with: how they are described, whether they keep experts, what they draft with.

Sets are told apart by name in every result: ``generous`` (the presets as they stand: each operation at the faster place, the
highest bandwidths that a source allows, drafts without a cache of their own), ``published`` (what the rivals' own papers,
simulators and benchmarks state, ``presets/rivals/published.yaml``), and ``duplex``, the same but for bank PIM, which is that
of Duplex's simulator and not Samsung's. Two further axes are unknown for all of them: whether a fast memory keeps experts,
and what rivals draft with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from elmoe.errors import HardwareError
from elmoe.schema.drafters import Drafters, RivalDrafts
from elmoe.schema.hardware import Hardware, load_hardware
from elmoe.schema.rivals import Step, drafters_after, steps_of, system_after, variant, variant_names
from elmoe.sim.paper import EXPERT_CACHES, RIVAL_DRAFTS, RIVAL_SETS, SYSTEMS
from elmoe.systems.forms import FORMS, FormName

ExpertCache = Literal["none", "static", "lru"]
"""Whole experts in a rival's fast memory: none; what the prompts made resident; the least recently used goes first."""
AS_DESCRIBED = "as described"
"""Label of rows whose rivals keep what their descriptions say."""
FORMS_OF: dict[str, tuple[FormName, ...]] = {"none": ("ar",), "eagle": ("ar", "eagle"), "all": FORMS}


@dataclass(frozen=True)
class Setting:
    """The rivals of a result. ``expert_cache``: None leaves it to the descriptions."""

    rivals: Literal["generous", "published", "duplex"] = "generous"
    expert_cache: ExpertCache | None = None
    rival_drafts: RivalDrafts = "all"

    def __post_init__(self) -> None:
        for value, allowed, what in (
            (self.rivals, RIVAL_SETS, "set of rivals"), (self.expert_cache or "none", EXPERT_CACHES, "expert cache"),
            (self.rival_drafts, RIVAL_DRAFTS, "choice of rivals' drafts"),
        ):  # fmt: skip
            if value not in allowed:
                raise HardwareError(f"there is no {what} '{value}'", f"one of {', '.join(allowed)}")

    def systems(self, names: Iterable[str]) -> tuple[Hardware, ...]:
        """Presets and files by name; rivals among the presets in this setting."""
        return tuple(with_expert_cache(self._load(name), self.expert_cache) for name in names)

    def _load(self, name: str) -> Hardware:
        own = f"{name}_{self.rivals}"
        return variant(own) if own in variant_names() else load_hardware(name)

    @property
    def drafters(self) -> Drafters:
        """What the rivals draft with."""
        return drafters_after(() if self.rivals == "generous" else steps_of(self.rivals))

    @property
    def labels(self) -> dict[str, str]:
        """What rows and results say of it."""
        return {
            "rivals": self.rivals, "expert_cache": self.expert_cache or AS_DESCRIBED, "rival_drafts": self.rival_drafts,
        }  # fmt: skip

    def drafts_with(self, hardware: Hardware, form: FormName) -> bool:
        """Whether a system runs a form here: the choice is the rivals', ELMoE-3D's own forms are always run."""
        return is_ours(hardware) or form in FORMS_OF[self.rival_drafts]


def is_ours(hardware: Hardware) -> bool:
    """Whether a description is ELMoE-3D's or alike: it keeps slices of experts."""
    return hardware.features.bit_slices and hardware.features.expert_cache


def with_expert_cache(hardware: Hardware, cache: ExpertCache | None) -> Hardware:
    """A rival with a fast memory that keeps so many experts, whole ones; any other system, or with None, as it is."""
    if cache is None or hardware.fast is None or is_ours(hardware):
        return hardware
    features = msgspec.structs.replace(
        hardware.features, expert_cache=cache != "none", refill=cache == "lru", bit_slices=False
    )
    return msgspec.structs.replace(hardware, features=features)


@dataclass(frozen=True)
class Change:
    """A step of the published set, and all systems and drafters after it."""

    name: str
    source: str
    systems: tuple[Hardware, ...]
    drafters: Drafters


def changes(cumulative: bool, names: Iterable[str] = SYSTEMS) -> Iterator[Change]:
    """The steps from the generous to the published set: each alone, or each on top of those before it.

    The last cumulative one is the published set itself.
    """
    steps, names = steps_of("published"), tuple(names)
    for index, step in enumerate(steps):
        taken: tuple[Step, ...] = steps[: index + 1] if cumulative else (step,)
        yield Change(step.name, step.source, tuple(system_after(name, taken) for name in names), drafters_after(taken))
