"""``elmoe bench``."""

from __future__ import annotations

from typing import Any

import click

from elmoe.cli.common import IntegerList, Serving, json_option, print_json, seed_type, serving_options, temperature_type
from elmoe.terminal import number, percent, print_table, progress_bar, size

WORDS = """acceptance: share of draft tokens that the model took. MSB hits: share of upper bits (MSB slices) found in memory.
slow bytes: read from disk, or what would be in a simulated tier; plain mode keeps nothing in memory. overhead: time
outside of kernels and reads. identical: the same tokens in every row."""
"""What the columns mean."""


@click.command("bench")
@click.argument("store")
@click.option("--modes", default="plain,cache,elastic", show_default=True, help="Comma-separated modes.")
@click.option("--batch", "batches", type=IntegerList(), default="1,4", show_default=True, help="Batch sizes.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=32, show_default=True, help="Random tokens of a prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of an answer.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs per row; medians are shown.")
@click.option("--temperature", type=temperature_type, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--seed", type=seed_type, default=0, show_default=True, help="Of random prompts and of sampling.")
@click.option("--replay", "traces", multiple=True, type=click.Path(exists=True, dir_okay=False),
              help="Take prompts, tokens, routing and acceptance from a trace of `elmoe trace record --every-position`; may "
              "be repeated for traces of other resident shares.")  # fmt: skip
@serving_options
@json_option
def command(
    store: str, modes: str, batches: tuple[int, ...], prompt_tokens: int, max_tokens: int, repeats: int, temperature: float,
    seed: int, traces: tuple[str, ...], serving: Serving, as_json: bool,
) -> None:  # fmt: skip
    """Measure the throughput of STORE in modes and batch sizes; every row must give the same tokens."""
    from elmoe.bitslice import SamplingParameters
    from elmoe.errors import RequestError
    from elmoe.measure.benchmark import benchmark, random_prompts
    from elmoe.store import peak_memory

    names: list[Any] = modes.split(",")
    for name in names:
        if name not in ("plain", "cache", "elastic"):
            raise RequestError(f"'{name}' is no mode", "use plain, cache or elastic")
    if "elastic" not in names:
        serving.check_mode(names[0])
    options = serving.options("elastic", max(batches))
    with serving.load(store, options) as model:
        label = model.tier
        if traces:
            from elmoe.measure.replay import ReplayBackend
            from elmoe.trace import draft_facts_of_trace, read_trace

            facts = [draft_facts_of_trace(read_trace(path)) for path in traces]
            replay = ReplayBackend(model.backend, model.reader.spec, facts)
            requests = replay.requests(list(range(max(batches))), max_tokens)
            label += "; replayed"
        else:
            replay = None
            sampling = SamplingParameters(temperature, seed=seed)
            requests = random_prompts(model, max(batches), prompt_tokens, max_tokens, sampling)
        with progress_bar("runs", (repeats + 1) * len(names) * len(batches)) as bar:
            done = iter(range(1, 10**6))
            rows = benchmark(model, requests, names, batches, repeats, lambda: bar(next(done)), replay)
    if as_json:
        print_json({"tier": label, "peak_memory_bytes": peak_memory(), "rows": rows})
        return
    print_table(
        f"{len(requests)} sequences x {max_tokens} tokens; {label}; median of {repeats}",
        ("mode", "batch", "tokens/s", "acceptance", "tokens/verification", "MSB hits", "slow bytes/token",
         "overhead ms/token", "identical"),
        [
            (row["mode"], row["batch"], number(row["tokens_per_second"], 1), percent(row["acceptance_rate"]),
             number(row["tokens_per_verification"]), percent(row["msb_hit_rate"]), size(row["slow_bytes_per_token"]),
             number(row["overhead_ms_per_token"], 3), "yes" if row["identical"] else "NO")
            for row in rows
        ],
    )  # fmt: skip
    click.echo(WORDS)
