"""The picture of a result of bench/offload.py.

.venv/bin/python -m bench.offload --json > result.json
.venv/bin/python -m bench.offload_plot result.json docs/offload.png     # needs matplotlib
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

COLOURS = {"naive": "#9aa5b1", "lru": "#2186eb", "elastic": "#e8590c", "llama.cpp": "#3ebd93"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = json.loads(arguments.result.read_text())["rows"]
    gains = {(row["batch"], row["budget"]): row["over_naive"] for row in rows if row["system"] == "elastic"}
    resident = {row["batch"]: row["resident_tokens_per_second"] for row in rows if row["system"] == "naive"}
    budgets = sorted({row["budget"] for row in rows if row["system"] == "elastic"})
    batches = sorted(resident)
    figure, panels = pyplot.subplots(1, len(budgets), figsize=(4.4 * len(budgets), 3.6), sharey=True, dpi=110, squeeze=False)
    for panel, budget in zip(panels[0], budgets, strict=True):
        systems = [name for name in COLOURS if any(row["system"] == name for row in rows)]
        for index, system in enumerate(systems):
            rates = [
                next(
                    (
                        row["tokens_per_second"]
                        for row in rows
                        if (row["system"], row["batch"], row["budget"]) == (system, batch, budget)
                    ),
                    0,
                )
                for batch in batches
            ]
            places = [place + (index - (len(systems) - 1) / 2) * 0.2 for place in range(len(batches))]
            bars = panel.bar(places, rates, 0.19, label=system, color=COLOURS[system])
            if system == "elastic":
                labels = [f"{gains[batch, budget]:.1f}x" for batch in batches]
                panel.bar_label(bars, labels, fontsize=7)
        for place, batch in enumerate(batches):
            panel.hlines(resident[batch], place - 0.45, place + 0.45, colors="#52606d", linestyles="dotted", linewidth=1)
        panel.set_xticks(range(len(batches)), batches)
        panel.set_yscale("log")
        panel.set_ylim(top=4 * max(resident.values()))  # room for the legend
        panel.set_xlabel("batch")
        panel.set_title(f"{budget / 2**30:.3g} GiB" if budget > 1 else f"{budget:.0%} of the experts", fontsize=10)
    panels[0][0].set_ylabel("tokens/s (dotted: all in memory)")
    panels[0][0].legend(fontsize=7, ncols=2, loc="upper left")
    figure.tight_layout()
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
