"""Where the time of an offloaded elastic run goes: a Chrome trace (for Perfetto) and a picture of its middle.

    .venv/bin/python -m bench.timeline [--batch 8] [--layers 4] [--out docs/timeline.png] [--trace build/offload/run.json]

Uses the stores and traces of bench/offload.py (run it first) and matplotlib (`pip install matplotlib`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.offload_stores import recorded_traces, synthetic_store
from elmoe import kernels
from elmoe.engine.engine import Engine
from elmoe.engine.observe import Timeline
from elmoe.engine.options import EngineOptions
from elmoe.measure.replay import ReplayBackend
from elmoe.store import open_direct
from elmoe.trace import draft_facts_of_trace, read_trace

COLOURS = {
    "prefill": "#9aa5b1", "plain": "#7b8794", "draft": "#f0b429", "verify": "#2186eb", "experts": "#3ebd93",
    "attention": "#8662c7", "logits": "#c99a2e", "read ahead": "#fadb5f", "read": "#e8590c", "expert": "#cf1124",
}  # fmt: skip
"""By the longest prefix of a span's name; the rest is grey."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/offload"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5, help="of the expert bytes in the fast tier")
    parser.add_argument("--seconds", type=float, default=1.6, help="shown in the picture")
    parser.add_argument("--out", type=Path, default=Path("docs/timeline.png"))
    parser.add_argument("--trace", type=Path, default=Path("build/offload/run.json"))
    arguments = parser.parse_args()
    kernels.set_threads(2)
    timeline = Timeline()
    facts = [draft_facts_of_trace(read_trace(path)) for path in recorded_traces(arguments.folder, None)]
    with open_direct(synthetic_store(arguments.folder, arguments.layers)) as reader:
        replay = ReplayBackend(kernels, reader.spec, facts)
        options = EngineOptions(batch=arguments.batch, fast_memory=arguments.share)
        engine = Engine(reader, replay, options, replay)
        requests = replay.requests(list(range(arguments.batch)), 48)
        engine.generate(requests)
        timeline.spans.clear()
        _, statistics = engine.generate(requests, timeline=timeline)
    timeline.write(arguments.trace)
    decode = [span for span in timeline.spans if span.track == "passes" and not span.name.startswith("prefill")]
    timeline.spans = [span for span in timeline.spans if span.ended > decode[0].began]
    hidden = timeline.hidden_share()
    title = (
        f"OLMoE-1B-7B shapes, {arguments.layers} layers, batch {arguments.batch}, {arguments.share:.0%} of the experts, "
        f"replayed: {statistics.as_dict()['tokens_per_second']:.0f} tokens/s, {hidden:.0%} of the read time behind compute"
    )
    print(title)
    draw(timeline, decode[len(decode) // 3].began, arguments.seconds, title, arguments.out)


def draw(timeline: Timeline, first: float, seconds: float, title: str, out: Path) -> None:
    """One row per track."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    order = ["passes", "kernels", "waits"]
    tracks = order + sorted({span.track for span in timeline.spans} - set(order))
    figure, axes = pyplot.subplots(figsize=(14, 4.2), dpi=110)
    shown = set()
    for row, track in enumerate(tracks):
        for name, colour in [(key, COLOURS[key]) for key in COLOURS] + [("other", "#cbd2d9")]:
            spans = [
                (1e3 * (begin - first), 1e3 * (end - begin))
                for where, what, begin, end in timeline.spans
                if where == track and end > first and begin < first + seconds and kind_of(what) == name
            ]
            if spans:
                axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=colour)
                shown.add((name, colour))
    axes.set_yticks(range(len(tracks)), tracks)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * seconds)
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10, loc="left")
    names = {"expert": "waiting for an expert"}
    axes.legend(
        handles=[Patch(color=colour, label=names.get(name, name)) for name, colour in sorted(shown)],
        ncol=6, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(out)


def kind_of(name: str) -> str:
    """The key of COLOURS that a span's name begins with."""
    fitting = [key for key in COLOURS if name.startswith(key)]
    return max(fitting, key=len) if fitting else "other"


if __name__ == "__main__":
    main()
