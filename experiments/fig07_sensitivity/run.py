"""How far the headline moves when each constant on which sources disagree goes to its least and greatest value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from elmoe.report.figures import tornado
from elmoe.report.headline import compare
from elmoe.report.section import Section, Table
from elmoe.schema.drafters import Drafters
from elmoe.schema.hardware import Hardware
from elmoe.sim.sweep import Described, changed, ranged
from elmoe.systems.forms import Odds
from experiments.common import Scope, mean, rows_of, study, systems

ODDS = Odds("0.6", 0.6, "published range")
RATIOS = {
    "speed over the xPU": "speed_over_xpu",
    "speed over the best prior system": "speed_over_prior",
    "energy efficiency over the xPU": "energy_over_xpu",
}


@dataclass(frozen=True)
class World:
    """All systems, and what the rivals draft with."""

    systems: tuple[Hardware, ...]
    drafters: Drafters

    def at(self, path: str, high: bool) -> World:
        """With a constant at its greatest or least value, in whatever has it."""
        return World(tuple(_moved(system, path, high) for system in self.systems), _moved(self.drafters, path, high))


def run(scope: Scope) -> Section:
    """Tornado plots of speed and energy, for one model and prompt set."""
    scope = replace(scope, models=scope.models[:1], prompts=scope.prompts[:1])
    world = World(systems(scope), scope.setting.drafters)
    paths = dict.fromkeys(item.path for described in (*world.systems, world.drafters) for item in ranged(described))
    base = headline(scope, world)
    moved = {path: (headline(scope, world.at(path, False)), headline(scope, world.at(path, True))) for path in paths}
    figures, tables, words = [], [], []
    for title, key in RATIOS.items():
        low, high = [m[0][key] for m in moved.values()], [m[1][key] for m in moved.values()]
        figures.append(tornado(f"{title}: {base[key]:.2f}x", list(moved), low, high, base[key], "x"))
        tables.append(
            Table(
                title=title, status="simulated, acceptance 0.6", columns=("constant", "at its least", "at its greatest"),
                rows=tuple((path, a, b) for path, a, b in zip(moved, low, high, strict=True)),
            )
        )  # fmt: skip
        widest = sorted(moved, key=lambda path: -abs(moved[path][1][key] - moved[path][0][key]))[:3]
        spans = (f"{path} ({moved[path][0][key]:.2f}-{moved[path][1][key]:.2f}x)" for path in widest)
        words.append(f"{title}: {base[key]:.2f}x, most moved by {', '.join(spans)}")
    return Section(
        name="sensitivity", title=f"Constants on which sources disagree ({scope.models[0]}, {scope.prompts[0]})",
        claim="The headline does not hang on one assumed constant.", verdict=".\n".join(words) + ".",
        command="python -m experiments.fig07_sensitivity.run", figures=tuple(figures), tables=tuple(tables),
    )  # fmt: skip


def _moved(described: Described, path: str, high: bool) -> Described:
    """With its own constant of that path at an end of its range, if it has one."""
    own = {item.path: item.constant for item in ranged(described)}
    return changed(described, path, own[path].high if high else own[path].low) if path in own else described


def headline(scope: Scope, world: World) -> dict[str, float]:
    """Means over batch sizes of the ratios."""
    rows = rows_of(scope, world.systems, forms=("ar", "eagle", "elastic"), odds=(ODDS,), drafters=world.drafters)
    comparisons = compare(rows)
    return {
        "speed_over_xpu": mean(c.speed_over_xpu for c in comparisons),
        "speed_over_prior": mean(c.speed_over_prior for c in comparisons),
        "energy_over_xpu": mean(c.energy_over_xpu["middle"] for c in comparisons),
    }


if __name__ == "__main__":
    study("fig07_sensitivity", run)
