"""The report page: every place is there once, words are about systems that the result holds, and nothing is hidden."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter

import pytest

from elmoe.errors import HardwareError
from elmoe.report.figures import bars, tornado
from elmoe.report.headline import Comparison, summary, verdict
from elmoe.report.overview import overview
from elmoe.report.page import write_page
from elmoe.report.section import read_section
from elmoe.report.systems import all_rows, busiest, energy_parts, summary_table, system_words
from elmoe.schema.hardware import load_hardware, preset_text
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.result import SimulationResult, averaged, read_result, result_of, write_result
from elmoe.systems.forms import Odds


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "my.yaml"
    text = preset_text("elmoe3d_8gb").replace("1638.4 GB/s", "3276.8 GB/s")
    path.write_text(re.sub("(?m)^name: .*", "name: mine", text))
    systems = tuple(load_hardware(name) for name in ("xpu", "elmoe3d_8gb", path))
    grid = Grid(
        systems, ("gpt-oss-20b",), ("gsm8k",), (1, 4), ("ar", "elastic"), (Odds("0.6", 0.6, "assumed"),), (2,), steps=4
    )
    return SimulationResult.of(
        grid, run_grid(grid, workers=1), "elmoe simulate --hardware 'my.yaml'", "2026-01-02 03:04 UTC"
    )


def without(result, name):
    return [row for row in result.rows if row["system"] != name]


def page(tmp_path, *sections):
    write_page(sections, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    return html[html.index("<body") :], html


def test_two_results_on_a_page_have_places_of_their_own(tmp_path, result):
    sections = [overview(result.rows, result.conditions, "x", file=name) for name in ("r0.json", "r1.json")]
    body, _ = page(tmp_path, *sections)
    ids = Counter(re.findall(r'\bid="([^"]+)"', body))
    drawn = re.findall(r'draw\("([^"]+)"', body)
    assert set(ids.values()) == {1} and len(set(drawn)) == len(drawn) == sum(len(s.figures) for s in sections)
    assert set(drawn) < set(ids)
    links = re.findall(r'<a href="#([^"]+)">([^<]+)<', body)
    assert len({target for target, _ in links}) == 2 and {target for target, _ in links} < set(ids)
    assert len({text for _, text in links}) == 2


def test_the_page_holds_the_command_the_date_constants_energy_bytes_and_the_busy_unit(tmp_path, result):
    body, html = page(tmp_path, overview(result.rows, result.conditions, "x", file="r0.json"))
    for text in (
        "elmoe simulate --hardware", "2026-01-02 03:04 UTC", "r0.json", "Constants of the systems", "main.bandwidth",
        "102.4 GB/s", "static power", "main, bytes/token", "busiest unit", "changed by the user in my.yaml",
    ):  # fmt: skip
        assert text in body, text
    assert "showSendToCloud: false" in html and "@media print" in html and "prefers-color-scheme: dark" in html
    assert "width=device-width" in html and "http" not in re.sub(r"<script>.*?</script>", "", html, flags=re.S)


def test_an_own_system_has_its_summary(result):
    section = overview(result.rows, result.conditions, "x")
    assert re.search(r"mine: \d+\.\d\dx the speed and \d+\.\d\dx the tokens per joule of plain xpu", section.verdict)
    assert "Changed by the user, not published: mine: fast.bandwidth is 3.2768 TB/s." in section.verdict
    table = summary_table(result.rows, "xpu")
    assert [row[0] for row in table.rows] == ["xpu", "elmoe3d_8gb", "mine"] and table.rows[0][1] == 1.0


def test_claims_are_judged_only_about_systems_in_the_result(result):
    verdict = overview(result.rows, result.conditions, "x").verdict
    assert re.search(r"speed over xPU: \d+\.\d\dx at 0.6; the paper's claim of 6.6x is NOT JUDGED", verdict)
    assert "over best prior:" not in verdict
    assert "the paper's means are over batch 1 to 16, this result has 1 to 4" in verdict
    assert "not judged: the result lacks xpu_pim, xpu_logicpim, xpu_nmp, hb_xpu" in verdict
    own = overview(without(result, "elmoe3d_8gb"), result.conditions, "x")
    assert "claim" not in own.verdict and "elmoe3d_8gb" not in own.verdict and "mine:" in own.verdict
    assert all("elmoe3d" not in json.dumps(figure.plot) for figure in own.figures)


def test_energy_by_part_sums_to_the_whole(result):
    for row in result.rows:
        assert sum(energy_parts(row).values()) == pytest.approx(row["joules_per_token"]["middle"])
        name, share = busiest(row)
        assert share == max(row["busy"].values()) == row["busy"][name]


def test_every_row_is_on_the_page(result):
    assert len(all_rows(result.rows).rows) == len(result.rows)
    assert system_words(result.rows, "xpu").count("\n") == 1


def test_bars_start_at_zero_and_logarithmic_axes_have_dots():
    plot = bars("t", ["a"], {"s": [3.0]}, "x").plot
    assert plot["data"][0]["type"] == "bar" and plot["layout"]["yaxis"]["rangemode"] == "tozero"
    plot = bars("t", ["a"], {"s": [3.0]}, "x", logarithmic=True).plot
    assert (plot["data"][0]["type"], plot["data"][0]["mode"]) == ("scatter", "markers")
    plot = tornado("t", ["a"], [2.0], [5.0], 3.0, "x").plot
    assert all("base" not in trace for trace in plot["data"]) and plot["data"][1]["x"] == [2.0]


def test_a_result_survives_its_file(tmp_path, result):
    write_result(result, tmp_path / "r.json")
    assert read_result(tmp_path / "r.json") == result


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("rows", 1, "speedup"), "absent", r"row 2: .*`speedup`"),
        (("rows", 0, "batch"), 0, r"row 1: .*`\$\.batch`"),
        (("rows", 0, "batch"), "1", r"row 1"),
        (("rows", 0, "tokens_per_second"), None, r"row 1: .*tokens_per_second"),
        (("rows", 0, "joules_per_token"), {"low": 1.0}, r"row 1: .*joules_per_token"),
        (("rows", 0, "busy"), [], r"row 1: .*busy"),
        (("rows", 0), 5, r"row 1"),
        (("rows",), {}, r"not a result file"),
        (("conditions",), [], r"not a result file"),
        (("version",), 99, r"version 1"),
    ],
)
def test_a_damaged_result_names_the_row_and_the_key(result, path, value, told):
    data = copy.deepcopy(result.as_dict())
    *parents, last = path
    node = data
    for key in parents:
        node = node[key]
    if value == "absent":
        del node[last]
    else:
        node[last] = value
    with pytest.raises(HardwareError, match=rf"r\.json.*{told}"):
        result_of(data, "r.json")


def test_a_result_without_a_simulated_row_is_told(result):
    labels = ("system", "form", "model", "prompts", "batch", "acceptance")
    rows = [{name: row[name] for name in labels} | {"error": "does not fit"} for row in result.rows]
    result_of({"version": 1, "rows": rows}, "r.json")
    with pytest.raises(HardwareError, match="no simulated row"):
        overview(rows, {}, "x")


def test_names_are_shown_as_they_are(tmp_path, result):
    rows = copy.deepcopy(result.rows)
    for row in rows:
        row["system"] = row["system"].replace("mine", "<script>alert(1)</script>")
    body, _ = page(tmp_path, overview(rows, {}, "x", file="<b>.json"))
    assert "<script>alert" not in body and "&lt;script&gt;alert" in body and "<b>.json" not in body


@pytest.mark.parametrize("plot", [{}, {"data": []}, {"data": {}, "layout": {}}, {"data": [], "layout": []},
                                  {"data": [], "layout": {"height": "<b>"}}])  # fmt: skip
def test_a_section_with_a_damaged_plot_is_refused(tmp_path, plot):
    path, whole = tmp_path / "s.json", {"data": [], "layout": {"height": 300}}
    section = {"name": "n", "title": "t", "claim": "c", "verdict": "v", "command": "x"}
    for one, told in ((whole, None), (plot, "not a section of a report: a plot has|height of a plot")):
        path.write_text(json.dumps(section | {"figures": [{"title": "f", "plot": one}]}))
        if told is None:
            page(tmp_path, read_section(path))
        else:
            with pytest.raises(HardwareError, match=told):
                read_section(path)


def test_means_leave_out_rows_that_were_not_simulated(result):
    row = next(row for row in result.rows if row["system"] == "xPU" or row["form"] == "ar")
    left_out = {key: row[key] for key in ("system", "form", "model", "batch", "acceptance")} | {
        "prompts": "other", "error": "it does not fit",
    }  # fmt: skip
    key = (row["system"], row["form"], row["acceptance"]), row["batch"]
    assert averaged([row, left_out])[key] == (row["tokens_per_second"], row["speedup"])
    assert not averaged([left_out])


@pytest.mark.parametrize(("rate", "told"), [
    (7.0, "HOLDS at every acceptance (7.00x at 0.6); 1 of 2 conditions reach it at 0.6."),
    (5.0, "DOES NOT HOLD (5.00x at 0.6); it falls short by a factor of 1.32 at best, "
     "and 0 of 2 conditions reach it at 0.6."),
])  # fmt: skip
def test_a_verdict_says_how_many_conditions_reach_the_claim(rate, told):
    shares = dict.fromkeys(("low", "middle", "high"), 1.0)
    comparisons = [
        Comparison("m", "p", batch, "0.6", "ar", "xpu, ar", {}, rate + off, 1.0, shares, shares)
        for batch, off in ((1, 1.0), (2, -1.0))
    ]
    assert verdict("speed over xPU", summary(comparisons), comparisons) == f"speed over xPU: the claim of 6.6x {told}"
