"""``elmoe report``: result files to one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from elmoe.cli.common import force_option, json_option, print_json


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="report.html", show_default=True,
              help="The page.")  # fmt: skip
@force_option
@json_option
def command(results: tuple[Path, ...], out: Path, force: bool, as_json: bool) -> None:
    """Write a page from RESULTS: files of `elmoe simulate --out` and of the studies in experiments/."""
    from elmoe.errors import HardwareError
    from elmoe.files import check_output
    from elmoe.report.overview import overview
    from elmoe.report.page import write_page
    from elmoe.report.section import read_section
    from elmoe.sim.result import LABEL, SIZE_LIMIT, result_of
    from elmoe.untrusted import load_object, read_bytes

    check_output(out, force, "page")
    sections = []
    for path in results:
        raw = read_bytes(path, HardwareError, SIZE_LIMIT, "result file")
        data = load_object(raw, str(path), HardwareError, "write one with `elmoe simulate --out`")
        if data.get("label") == LABEL:
            result = result_of(data, str(path))
            sections.append(overview(result.rows, result.conditions, f"elmoe simulate --out {path.name}", file=path.name))
        else:
            sections.append(read_section(path))
    write_page(sections, out)
    if as_json:
        verdicts = [{"name": section.name, "title": section.title, "verdict": section.verdict} for section in sections]
        print_json({"page": str(out), "sections": verdicts})
        return
    for section in sections:
        click.echo(f"{section.title}\n{section.verdict}\n")
    click.echo(f"wrote {out}")
