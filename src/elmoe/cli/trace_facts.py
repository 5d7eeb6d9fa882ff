"""``elmoe trace import``, ``fit`` and ``synthesise``: routing facts of others, and made to measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from elmoe.cli.common import force_option, json_option, print_json
from elmoe.errors import RequestError
from elmoe.terminal import number, print_table

input_path = click.Path(exists=True, dir_okay=False, path_type=Path)
output_path = click.Path(dir_okay=False, path_type=Path)


@click.command("import")
@click.argument("source", metavar="SRC", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=output_path)
@click.option("--format", "kind", required=True, type=click.Choice(["ndjson", "vllm-routed", "esft", "olmoe", "fiddler"]),
              help="ndjson: steps logged by tools around llama.cpp, to routing facts. vllm-routed: arrays that vLLM returns "
              "with --enable-return-routed-experts (.npy, .npz, .json, .jsonl), to routing facts. Others: published "
              "statistics, to a popularity for `synthesise`: ESFT scores (a file or a folder), OLMoE counts, Fiddler's "
              "order.")  # fmt: skip
@click.option("--model", help="Which model of a file that holds several.")
@click.option("--experts", type=click.IntRange(1), help="Of a layer; vllm-routed needs it.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Of the one sequence in a .npy file of vllm-routed.")
@force_option
@json_option
def import_(
    source: Path, out: Path, kind: Any, model: str | None, experts: int | None, prompt_tokens: int | None, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Import routing that other programs recorded: SRC to OUT."""
    from elmoe.files import check_output

    if (kind == "vllm-routed") != (experts is not None):
        raise RequestError("--format vllm-routed and --experts go together", "the arrays do not say how many there are")
    if prompt_tokens is not None and kind != "vllm-routed":
        raise RequestError(f"--prompt-tokens is not for --format {kind}")
    check_output(out, force, "")
    from elmoe.trace import import_ndjson, import_popularity, import_vllm_routed, save_popularity, write_facts

    if kind in ("ndjson", "vllm-routed"):
        facts = import_ndjson(source) if experts is None else import_vllm_routed(source, experts, prompt_tokens)
        write_facts(facts, out)
        told: dict[str, Any] = {"source": facts.source, "shape": facts.ranked.shape, "prompt": facts.prompts.tolist()}
    else:
        popularity = import_popularity(source, kind, model)
        save_popularity(popularity, out)
        told = {
            "source": popularity.source, "model": popularity.model, "status": popularity.status,
            "layers": popularity.layers, "experts": popularity.experts, "domains": list(popularity.domains),
        }  # fmt: skip
    if as_json:
        print_json({"out": str(out), **told})
    else:
        click.echo(f"wrote {out}: " + "; ".join(f"{key} {_brief(value)}" for key, value in told.items()))


def _brief(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@click.command("fit")
@click.argument("path", metavar="TRACE", type=input_path)
@click.argument("out", type=output_path)
@force_option
@json_option
def fit(path: Path, out: Path, force: bool, as_json: bool) -> None:
    """Measure how local the routing of TRACE is, for `synthesise`.

    TRACE is a recording or a facts file. OUT is JSON."""
    from elmoe.files import check_output

    check_output(out, force, "locality")
    from msgspec import to_builtins

    from elmoe.trace import fit_locality, read_facts, save_locality

    locality = fit_locality(read_facts(path))
    save_locality(locality, out)
    statistics = (*locality.fit, *locality.check)
    if as_json:
        names = ("popularity", "sequence", "token", "correlation", "noise")
        print_json(
            {
                "out": str(out),
                **{name: getattr(locality, name) for name in names},
                "statistics": [to_builtins(row) for row in statistics],
            }
        )
        return
    click.echo(
        f"wrote {out}: popularity {locality.popularity:.3f}, sequence {locality.sequence:.3f}, token {locality.token:.3f} "
        f"(correlation {locality.correlation:.3f}), noise {locality.noise:.3f}"
    )
    print_table(
        "fit; LRU hits were not fitted",
        ("statistic", "measured", "synthetic", "error"),
        [
            (
                s.name,
                number(s.measured, 3),
                number(s.synthetic, 3),
                None if s.relative_error is None else f"{100 * s.relative_error:+.1f} %",
            )
            for s in statistics
        ],
    )


@click.command("synthesise")
@click.argument("source", metavar="FIT")
@click.argument("out", type=output_path)
@click.option("--experts", type=click.IntRange(1), required=True, help="Experts of a layer.")
@click.option("--top-k", type=click.IntRange(1), required=True, help="Experts per token.")
@click.option("--layers", type=click.IntRange(1), required=True, help="Layers with experts.")
@click.option("--sequences", type=click.IntRange(1), default=16, show_default=True, help="Texts.")
@click.option(
    "--positions", type=click.IntRange(1), default=96, show_default=True, help="Tokens of a text, its prompt included."
)
@click.option("--prompt", type=click.IntRange(1), default=1, show_default=True, help="Tokens of its prompt.")
@click.option("--ranks", type=click.IntRange(1), help="Experts ranked [default: twice top-k].")
@click.option(
    "--popularity", "popularity_path", type=input_path, help="A file of `elmoe trace import`, used instead of FIT's own."
)
@click.option("--domain", help="Which domain of --popularity [default: the mean of all].")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random draws.")
@force_option
@json_option
def synthesise(
    source: str, out: Path, experts: int, top_k: int, layers: int, sequences: int, positions: int, prompt: int,
    ranks: int | None, popularity_path: Path | None, domain: str | None, seed: int, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write synthetic routing OUT that is as local as FIT says.

    FIT is a file of `elmoe trace fit`, or a preset: a prompt set such as mt_bench, or a model such as qwen3-30b-a3b."""
    from elmoe.files import check_output

    check_output(out, force, "facts file")
    from elmoe.trace import load_locality, load_popularity, write_facts
    from elmoe.trace import synthesise as make
    from elmoe.trace.locality import measured

    popularity = load_popularity(popularity_path) if popularity_path else None
    facts = make(
        load_locality(source), experts, top_k, layers, sequences, positions, seed, ranks=ranks, prompt=prompt,
        popularity=popularity.table(layers, domain) if popularity else None,
    )  # fmt: skip
    if popularity is not None:
        of = f" of {popularity.model}, {domain or 'all domains'} ({popularity.source}; {popularity.status})"
        facts = replace(facts, source=facts.source + of)
    write_facts(facts, out)
    statistics = measured(facts.decoding())
    if as_json:
        print_json({"out": str(out), "source": facts.source, "shape": facts.ranked.shape, "statistics": statistics})
        return
    click.echo(f"wrote {out}: {facts.source}")
    print_table("decoded positions", ("statistic", ""), [(name, number(value, 3)) for name, value in statistics.items()])
