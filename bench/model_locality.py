"""Fits how local each model's routing is to what others have published of it: the presets of presets/locality by model.

    .venv/bin/python -m bench.model_locality [--model NAME ...] [--out src/elmoe/presets/locality] [--check]

The points, each with its source, are in presets/published; those for a fit are fitted, those held out are only compared. A
model of which one number is known gets a band: that number, with the shape of other models' locality. --check writes nothing
and fails where a preset is not what a fit gives. Minutes a model; deterministic.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
import numpy as np

from elmoe.policy.residency import ResidencyParameters
from elmoe.terminal import percent, print_table
from elmoe.trace.batches import BATCH_ROUTINGS, most_distinct, routed_together
from elmoe.trace.fit_published import common_share, fit_published, fit_strength, judged, tells_sequences_apart
from elmoe.trace.locality import PRESETS, Locality, load_locality, save_locality
from elmoe.trace.published import Published, load_published, published_models
from elmoe.trace.replacement import policy_hit_rate
from elmoe.trace.synthesis import synthesise

SPLIT = 0.37
"""Share of a text's fixed preferences that all texts have in common, where nothing tells: the mean of the three models of
which published numbers tell it (Qwen3-30B-A3B 0.45, DeepSeek-V2-Lite 0.41, OLMoE 0.24)."""
ENOUGH = 4
"""Points from which a model has a fit of its own."""
BATCH, TOKENS, LAYERS, SEED = 16, 64, 4, 20261202


def shaped(published: Published, shape: Locality, end: str, of: str) -> Locality:
    """A locality of another model's shape, with the strength that gives the one known number."""
    found = judged(fit_strength(published, shape), published)
    source = f"published: {published.model}, 1 number; {end}: the shape of {of}"
    return msgspec.structs.replace(found, source=source, status="assumed")


def band(published: Published, shapes: dict[str, Locality]) -> dict[str, Locality]:
    """By ending of the preset's name: the middle takes the shape of the nearest relative, the ends those of the models that
    give the fewest and the most hits of an LRU cache of half of the experts."""
    found = {name: shaped(published, shape, "band", name) for name, shape in shapes.items()}
    hits = {name: lru_hits(one, published.experts, published.top_k) for name, one in found.items()}
    low, high = min(hits, key=lambda name: hits[name]), max(hits, key=lambda name: hits[name])
    ends = {
        "": ("middle of a band", "deepseek-v2-lite"),
        "-low": ("low end of a band", low),
        "-high": ("high end of a band", high),
    }
    return {ending: shaped(published, shapes[name], end, name) for ending, (end, name) in ends.items()}


def lru_hits(locality: Locality, experts: int, top_k: int) -> float:
    """Of a cache of half of the experts, text after text."""
    facts = synthesise(locality, experts, top_k, LAYERS, 8, 128, SEED, ranks=top_k)
    return policy_hit_rate(facts.chosen[facts.computed], experts, experts // 2, ResidencyParameters("lru"))


def distinct(locality: Locality, experts: int, top_k: int) -> float:
    """Mean distinct experts of a batch per layer."""
    facts = synthesise(locality, experts, top_k, LAYERS, BATCH, TOKENS, SEED, ranks=top_k)
    counts = [len(np.unique(facts.chosen[:, t, layer])) for t in range(TOKENS) for layer in range(LAYERS)]
    return float(np.mean(counts))


def show(name: str, locality: Locality) -> None:
    """Parameters, and every point with its error."""
    rows = [(kind, s.name, f"{s.measured:.3f}", f"{s.synthetic:.3f}", f"{s.points:+.1f}")
            for kind, statistics in (("fit", locality.fit), ("held out", locality.check)) for s in statistics]  # fmt: skip
    print_table(
        f"{name}: popularity {locality.popularity}, sequence {locality.sequence}, token {locality.token}, correlation "
        f"{locality.correlation}; in common {common_share(locality):.2f}; errors in percentage points",
        ("", "number", "published", "synthetic", "error"), rows,
    )  # fmt: skip


def main() -> None:
    """Fit, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=published_models())
    parser.add_argument("--out", type=Path, default=PRESETS)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    chosen = arguments.model or list(published_models())
    found: dict[str, Locality] = {}
    different: list[str] = []

    def keep(name: str, locality: Locality) -> None:
        found[name] = locality
        if not arguments.check:
            save_locality(locality, arguments.out / f"{name}.json")
        elif load_locality(arguments.out / f"{name}.json") != locality:
            different.append(name)
        show(name, locality)

    for model in sorted(chosen, key=lambda name: len(load_published(name).points) < ENOUGH):
        published = load_published(model)
        if len(published.points) >= ENOUGH:
            keep(model, fit_published(published, None if tells_sequences_apart(published.fitted) else SPLIT))
        else:
            shapes = {name: found.get(name) or load_locality(name) for name in published_models()
                      if len(load_published(name).points) >= ENOUGH and load_published(name).experts >= 32}  # fmt: skip
            for ending, one in band(published, shapes).items():
                keep(model + ending, one)
    shape = {name: (one.shape.experts, one.shape.top_k) for name, one in found.items() if one.shape}
    print_table(
        f"LRU hits with half of the experts kept, and distinct experts of a batch of {BATCH}",
        ("model", "hits", *BATCH_ROUTINGS, "balanced and independent"),
        [
            (name, percent(lru_hits(one, *shape[name])),
             *(f"{distinct(routed_together(one, routing), *shape[name]):.1f}" for routing in BATCH_ROUTINGS),
             f"{most_distinct(*shape[name], BATCH):.1f}")
            for name, one in found.items()
        ],
    )  # fmt: skip
    if different:
        sys.exit(f"not what a fit gives: {', '.join(different)}")


if __name__ == "__main__":
    main()
