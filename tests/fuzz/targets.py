"""What is fuzzed: readers of files that others wrote. Each takes bytes and may fail with an ElmoeError only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tests.checkpoints import tiny_config, write_checkpoint
from tests.fuzz.mutation import Kind

SMALL = dict(
    vocab_size=261, hidden_size=32, moe_intermediate_size=32, intermediate_size=32, num_hidden_layers=2, num_experts=2,
    num_experts_per_tok=1, num_attention_heads=2, num_key_value_heads=1, mlp_only_layers=[1],
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """``prepare`` makes what a folder needs, ``seeds`` valid inputs in it; ``run`` reads an input in the folder."""

    name: str
    kind: Kind
    prepare: Callable[[Path], None]
    seeds: Callable[[Path], list[bytes]]
    run: Callable[[Path, bytes], None]


def _nothing(folder: Path) -> None:
    pass


def _checkpoint(folder: Path) -> None:
    write_checkpoint(folder / "source", tiny_config(**SMALL))


def _store(folder: Path) -> None:
    from elmoe.convert import convert_checkpoint

    _checkpoint(folder)
    (folder / "source" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    convert_checkpoint(folder / "source", folder / "store")


def _generate(store: Path) -> None:
    """A few tokens, so that native code sees every shape that the reader let through."""
    from elmoe import kernels
    from elmoe.engine.engine import Engine
    from elmoe.engine.options import EngineOptions
    from elmoe.engine.request import Request
    from elmoe.models.load import load_model
    from elmoe.store import open_store

    load_model(store).spec.moe(0)
    with open_store(store) as reader:
        reader.tokenizer()
        reader.chat_template()
        engine = Engine(reader, kernels, EngineOptions(mode="elastic", draft_length=2))
        engine.generate([Request((1, 2, 3), 3)])


def _run_manifest(folder: Path, raw: bytes) -> None:
    (folder / "store" / "manifest.json").write_bytes(raw)
    _generate(folder / "store")


def _run_dense(folder: Path, raw: bytes) -> None:
    (folder / "store" / "dense.bin").write_bytes(raw)
    _generate(folder / "store")


def _read_source(source: Path, tokenizer: Path | None = None) -> None:
    """All that a conversion reads, without what it writes."""
    from elmoe.convert.source import open_source
    from elmoe.models.tensors import feed_forward, tensors
    from elmoe.store.layout import record_layout
    from elmoe.tokenizer import load_tokenizer

    model = open_source(source, tokenizer)
    load_tokenizer(model.tokenizer(), "tokenizer.json")
    model.chat_template()
    model.special_tokens()
    model.check()
    for tensor in tensors(model.spec):
        if tensor.kind == "floats":
            model.floats(tensor)
            continue
        for piece, format in tensor.pieces(tensor.format(model.formats)).values():
            model.matrix(piece, 0, min(16, piece.shape[0]), format)
    for layer in range(len(model.spec.layers)):
        part = feed_forward(model.spec, layer)
        model.projections(part, 0, record_layout(part, part.format(model.formats)).formats)


def _checkpoint_file(name: str) -> Callable[[Path, bytes], None]:
    def run(folder: Path, raw: bytes) -> None:
        (folder / "source" / name).write_bytes(raw)
        _read_source(folder / "source")

    return run


def _run_config(folder: Path, raw: bytes) -> None:
    from elmoe.errors import ElmoeError
    from elmoe.models.load import load_model
    from elmoe.models.sizes import ModelSizes

    (folder / "source" / "config.json").write_bytes(raw)
    try:
        sizes: ModelSizes = load_model(folder / "source" / "config.json")
        _ = sizes.parameters, sizes.total_bytes, sizes.active_bytes
    except ElmoeError:
        pass
    _read_source(folder / "source")


def _configs(folder: Path) -> list[bytes]:
    found = [path.read_bytes() for path in (files("elmoe.presets") / "models").iterdir() if path.name.endswith(".json")]
    return [(folder / "source" / "config.json").read_bytes(), *found]


def _source_seed(name: str, *others: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        path = folder / "source" / name
        return [*([path.read_bytes()] if path.is_file() else []), *(text.encode() for text in others)]

    return seeds


def _sharded(folder: Path) -> None:
    write_checkpoint(folder / "source", tiny_config(**SMALL), shards=2)


def _gguf(folder: Path) -> None:
    from elmoe.convert.gguf_export import export_store
    from elmoe.store import open_store

    _store(folder)
    with open_store(folder / "store") as reader:
        export_store(reader, folder / "seed.gguf")


def _run_gguf(folder: Path, raw: bytes) -> None:
    (folder / "a.gguf").write_bytes(raw)
    _read_source(folder / "a.gguf")


def _run_tokenizer(folder: Path, raw: bytes) -> None:
    from elmoe.convert.gguf_tokenizer import describe
    from elmoe.errors import ElmoeError, StoreError
    from elmoe.text import TextStream
    from elmoe.tokenizer import TOKENIZER_LIMIT, encode, load_tokenizer, split_stops
    from elmoe.untrusted import read_bytes

    (folder / "tokenizer.json").write_bytes(raw)  # and read with the bound that stores and checkpoints have
    raw = read_bytes(folder / "tokenizer.json", StoreError, TOKENIZER_LIMIT, "tokenizer")
    with suppress(ElmoeError):
        describe(raw, 300)
    tokenizer = load_tokenizer(raw, "tokenizer.json")
    split_stops(tokenizer, ["a", "<end>"])
    prompt = encode(tokenizer, "The whale's 12 tails é")
    stream = TextStream(lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True), prompt)
    for token in (1, 2, 3):
        stream.push(token)
    stream.take(last=True)


def _tokenizers(folder: Path) -> list[bytes]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.5), ("▁The", -2.0), ("e", -3.0)], unk_id=0))
    pieces.normalizer, pieces.decoder = normalizers.NFKC(), decoders.Metaspace()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##le": 2, "12": 3}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.post_processor = processors.TemplateProcessing("[UNK] $A", None, [("[UNK]", 0)])
    words.enable_truncation(8)
    words.enable_padding()
    plain = Tokenizer(models.WordLevel({"The": 0, "whale": 1, "?": 2}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    plain.add_special_tokens(["<end>"])
    others = [one.to_str().encode() for one in (pieces, words, plain)]
    return [(folder / "source" / "tokenizer.json").read_bytes(), *others]


MESSAGES = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello <b>"},
    {"role": "assistant", "content": "hi", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "user", "content": "é"},
]  # fmt: skip
TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}",
    "{% set ns = namespace(last=0, text='') %}\n{% for m in messages %}\n{% set ns.last = loop.index0 %}\n"
    "{% if m['role'] == 'system' %}\n{{ bos_token + m.content }}\n{% elif m.tool_calls %}\n"
    "{{ m.tool_calls | tojson(indent=2) }}\n{% else %}\n"
    "{{ raise_exception('no') if loop.index > 9 else m.content }}\n{% endif %}\n{% endfor %}\n{{ ns.last }}",
    "{% macro show(x, n=3) %}\n{{ x | upper | replace('A', 'b') | default('', true) }}\n{% if n > 0 %}{{ show(x, n - 1) }}"
    "{% endif %}\n{% endmacro %}\n{% for m in messages[1:] | selectattr('role', 'equalto', 'user') %}\n"
    "{{ show(m.content) }}\n{% generation %}{{ '%d' % loop.index }}{% endgeneration %}{% break %}\n"
    "{% endfor %}\n{{ strftime_now('%Y') }}",
)


def _run_template(folder: Path, raw: bytes) -> None:
    from elmoe.chat import check_template, render

    text = raw.decode("utf-8", "surrogatepass") if _is_text(raw) else raw.decode("latin-1")
    check_template(text)
    render(text, MESSAGES, {"bos_token": "<s>"})


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode("utf-8", "surrogatepass")
        return True
    except UnicodeDecodeError:
        return False


def _presets(folder: str, *names: str) -> Callable[[Path], list[bytes]]:
    def seeds(_: Path) -> list[bytes]:
        found = [path for path in (files("elmoe.presets") / folder).iterdir() if path.name.endswith((".yaml", ".json"))]
        return [path.read_bytes() for path in sorted(found, key=lambda path: path.name) if not names or path.name in names]

    return seeds


def _run_hardware(folder: Path, raw: bytes) -> None:
    """Loaded, written, loaded again, and priced in one cell."""
    from elmoe.schema.hardware import load_hardware, write_hardware
    from elmoe.sim.grid import Grid, run_grid
    from elmoe.systems.forms import Odds

    path = folder / "mine.yaml"
    path.write_bytes(raw)
    hardware = load_hardware(path)
    write_hardware(hardware, folder / "written.yaml")
    assert load_hardware(folder / "written.yaml") == hardware
    grid = Grid((hardware,), ("gpt-oss-20b",), ("gsm8k",), (1,), ("elastic",), (Odds("0.6", 0.6, "assumed"),), (2,), steps=2)
    json.dumps(run_grid(grid, workers=1))


def _run_validation(folder: Path, raw: bytes) -> None:
    from elmoe.errors import HardwareError
    from elmoe.schema.validation import validation_of_text
    from elmoe.untrusted import text_of

    validation_of_text(text_of(raw, "mine.yaml", HardwareError), "mine.yaml")


def _run_trace(folder: Path, raw: bytes) -> None:
    from elmoe.errors import ElmoeError
    from elmoe.trace import read_facts, read_trace
    from elmoe.trace.locality import measured
    from elmoe.trace.summary import summarise

    (folder / "a.trace").write_bytes(raw)
    with suppress(ElmoeError):
        summarise(read_trace(folder / "a.trace"))
    measured(read_facts(folder / "a.trace"))


def _traces(folder: Path) -> list[bytes]:
    import numpy as np

    from elmoe.trace import TraceRecorder, facts_of_trace, read_trace, write_facts
    from tests.tiny import tiny_spec

    with TraceRecorder(folder / "seed.trace", tiny_spec()) as recorder:
        for step in range(3):
            phase = "prefill" if step == 0 else "plain"
            recorder.record(
                phases=[phase] * 2, step=step, sequences=np.arange(2, dtype=np.int32),
                positions=np.full(2, step, np.int32), tokens=np.arange(2, dtype=np.int32), targets=[5] * 2,
                drafts=[None] * 2, confidences=[None] * 2, draft_lengths=[0] * 2,
                ranked=[np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.int32)] * 3,
                scores=[np.full((2, 4), 0.25, np.float32)] * 3, resident=np.eye(3, 8, dtype=bool),
            )  # fmt: skip
    write_facts(facts_of_trace(read_trace(folder / "seed.trace")), folder / "seed.facts")
    return [(folder / name).read_bytes() for name in ("seed.trace", "seed.facts")]


def _table_seeds(folder: Path) -> list[bytes]:
    """Parquet tables as JSON: a key of the metadata, the header in it, and the columns."""
    import pyarrow.parquet as pq

    _traces(folder)
    found = []
    for name in ("seed.trace", "seed.facts"):
        table = pq.read_table(folder / name)
        ((key, header),) = table.schema.metadata.items()
        columns = {column: table.column(column).to_pylist() for column in table.column_names if column != "resident"}
        found.append(json.dumps({"key": key.decode(), "header": json.loads(header), "columns": columns}).encode())
    return found


def _run_table(folder: Path, raw: bytes) -> None:
    """A table with the columns that the header asks for, as far as the values fit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        wanted = json.loads(raw)
        known = {"step": pa.int32(), "sequence": pa.int32(), "position": pa.int32(), 
                 "token": pa.int32(), "target": pa.int32(), "draft": pa.int32(), "confidence": pa.float32(),
                 "draft_length": pa.int32()}  # fmt: skip
        fields, arrays = [], []
        for name, values in wanted["columns"].items():
            width = max((len(value) for value in values if isinstance(value, list)), default=1)
            kind = known.get(name, pa.dictionary(pa.int8(), pa.string()) if name == "phase" else None)
            kind = kind or pa.list_(pa.float32() if name == "scores" else pa.uint16(), width)
            fields.append(pa.field(name, kind))
            arrays.append(pa.array(values, pa.string()).dictionary_encode().cast(kind) if name == "phase"
                          else pa.array(values, kind))  # fmt: skip
        if "step" in wanted["columns"]:
            fields.append(pa.field("resident", pa.binary()))
            arrays.append(pa.nulls(len(arrays[0]), pa.binary()))
        schema = pa.schema(fields, metadata={wanted["key"]: json.dumps(wanted["header"])})
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / "table.trace")
    except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, AttributeError, RecursionError, IndexError):
        return  # the change made no table
    _run_trace(folder, (folder / "table.trace").read_bytes())


NDJSON = (
    '{"n_layers": 2, "n_experts": 8, "top_k": 2}\n{"e": [0, 1, 0, 2, 1, 3, 1, 4]}\n{"e": [0, 5, 0, 6, 1, 7, 1, 0]}\n',
    '{"model": {"num_hidden_layers": 3, "num_experts": 4, "k": 1}}\n[0, 1]\n[2, 3]\n[0, 2]\n[2, 0]\n',
    '{"n_layers_routed": 2, "n_expert": 8, "n_expert_used": 2}\n{"phase": "prefill", "layers": [[1, 2], [3, 4]]}\n'
    '{"layers": [[1, 2], [3, 4]]}\n',
)


def _run_ndjson(folder: Path, raw: bytes) -> None:
    from elmoe.trace import import_ndjson, write_facts

    (folder / "log.ndjson").write_bytes(raw)
    write_facts(import_ndjson(folder / "log.ndjson"), folder / "log.facts")


POPULARITIES = (
    json.dumps({"order": [[0, 1], [0, 0], [1, 0], [1, 1]]}),
    json.dumps({"layers": [0, 1], "models": {"m": {"expert_counts": {"d": [[1, 2], [3, 4]], "e": [[1, 2], [0, 4]]}}}}),
    json.dumps({"token_scores": {"0": {"0": 0.25, "1": 0.75}, "1": {"0": 0.5, "1": 0.5}}}),
)


def _run_popularity(folder: Path, raw: bytes) -> None:
    from elmoe.errors import ElmoeError
    from elmoe.trace import import_popularity, load_popularity, save_popularity

    path = folder / "scores.json"
    path.write_bytes(raw)
    for kind in ("esft", "olmoe", "fiddler"):
        try:
            save_popularity(import_popularity(path, kind), folder / "popularity.json")  # type: ignore[arg-type]
            load_popularity(folder / "popularity.json").table(5)
        except ElmoeError:
            continue


def _run_locality(folder: Path, raw: bytes) -> None:
    from elmoe.trace import load_locality

    (folder / "locality.json").write_bytes(raw)
    load_locality(folder / "locality.json")


def _run_acceptance(folder: Path, raw: bytes) -> None:
    from elmoe.trace.acceptance import load_acceptance

    (folder / "acceptance.json").write_bytes(raw)
    load_acceptance(folder / "acceptance.json")


def _result_seeds(folder: Path) -> list[bytes]:
    from elmoe.report.overview import overview
    from elmoe.report.section import write_section
    from elmoe.schema.hardware import load_hardware
    from elmoe.sim.grid import Grid, run_grid
    from elmoe.sim.result import SimulationResult, write_result
    from elmoe.systems.forms import Odds

    systems = tuple(load_hardware(name) for name in ("xpu", "elmoe3d_8gb"))
    grid = Grid(
        systems, ("gpt-oss-20b",), ("gsm8k",), (1,), ("ar", "elastic"), (Odds("0.6", 0.6, "assumed"),), (2,), steps=2
    )
    result = SimulationResult.of(grid, run_grid(grid, workers=1), "elmoe simulate", "2026-01-02")
    write_result(result, folder / "result.json")
    section = overview(result.rows, result.conditions, "x")
    write_section(section, folder / "section.json")
    data = json.loads((folder / "result.json").read_bytes())
    data["conditions"]["constants"] = data["conditions"]["constants"][:2]
    section_data = json.loads((folder / "section.json").read_bytes())
    section_data["tables"], section_data["figures"] = section_data["tables"][:1], section_data["figures"][:1]
    return [json.dumps(data).encode(), json.dumps(section_data).encode()]


def _run_result(folder: Path, raw: bytes) -> None:
    """As `elmoe report`, called in this process."""
    import click

    from elmoe.cli.report import command

    path = folder / "r.json"
    path.write_bytes(raw)
    with click.Context(command):
        command.callback((path,), folder / "page.html", True, True)  # type: ignore[misc]


def _run_prompts(folder: Path, raw: bytes) -> None:
    from elmoe.chat import render
    from elmoe.cli.prompts import collect_prompts

    (folder / "p.jsonl").write_bytes(raw)
    for line in collect_prompts((), folder / "p.jsonl", False, None):
        if line.messages is not None:
            render(TEMPLATES[0], line.messages)


PROMPTS = (
    '"a"\n{"prompt": "b"}\n{"messages": [{"role": "user", "content": "c"}]}\n',
    '{"messages": [{"role": "user", "content": "c", "name": null}, {"role": "assistant", "content": "é"}]}',
)

TARGETS = {
    target.name: target
    for target in (
        Target("manifest", "json", _store, lambda folder: [(folder / "store/manifest.json").read_bytes()], _run_manifest),
        Target("dense", "binary", _store, lambda folder: [(folder / "store/dense.bin").read_bytes()], _run_dense),
        Target("safetensors", "safetensors", _checkpoint, _source_seed("model.safetensors"),
               _checkpoint_file("model.safetensors")),
        Target("index", "json", _sharded, _source_seed("model.safetensors.index.json"),
               _checkpoint_file("model.safetensors.index.json")),
        Target("config", "json", _checkpoint, _configs, _run_config),
        Target("generation_config", "json", _checkpoint, _source_seed("", '{"eos_token_id": [1, 2]}', '{"eos_token_id": 1}'),
               _checkpoint_file("generation_config.json")),
        Target("tokenizer_config", "json", _checkpoint,
               _source_seed("", '{"bos_token": "<s>", "eos_token": {"content": "x"}, "chat_template": "{{ messages }}"}',
                            '{"chat_template": [{"name": "default", "template": "a"},'
                            ' {"name": "tool_use", "template": "b"}]}'),
               _checkpoint_file("tokenizer_config.json")),
        Target("gguf", "binary", _gguf, lambda folder: [(folder / "seed.gguf").read_bytes()], _run_gguf),
        Target("tokenizer", "json", _checkpoint, _tokenizers, _run_tokenizer),
        Target("template", "text", _nothing, lambda _: [text.encode() for text in TEMPLATES], _run_template),
        Target("hardware", "text", _nothing, _presets("hardware"), _run_hardware),
        Target("validation", "text", _nothing, _presets("validation"), _run_validation),
        Target("trace", "binary", _nothing, _traces, _run_trace),
        Target("trace_table", "json", _nothing, _table_seeds, _run_table),
        Target("ndjson", "text", _nothing, lambda _: [text.encode() for text in NDJSON], _run_ndjson),
        Target("popularity", "json", _nothing, lambda _: [text.encode() for text in POPULARITIES], _run_popularity),
        Target("locality", "json", _nothing, _presets("locality", "gsm8k.json"), _run_locality),
        Target("acceptance", "json", _nothing, _presets("acceptance"), _run_acceptance),
        Target("result", "json", _nothing, _result_seeds, _run_result),
        Target("prompts", "text", _nothing, lambda _: [text.encode() for text in PROMPTS], _run_prompts),
    )
}  # fmt: skip


def _run_selftest(_: Path, raw: bytes) -> None:
    """What the harness must notice."""
    import ctypes
    import time

    kind, kept = raw.decode(), []
    if kind == "raise":
        raise ValueError(kind)
    if kind == "crash":
        ctypes.string_at(0)
    while kind == "memory" and len(kept) < 25:
        kept.append(b"x" * (1 << 26))
    while kind == "hang":
        pass
    if kind == "wait":
        time.sleep(60)


SELFTEST = Target("selftest", "text", _nothing, lambda _: [b"nothing"], _run_selftest)


def prepared(target: Target, folder: Path) -> list[bytes]:
    """The seeds of a target whose folder is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.prepare(folder)
    seeds = target.seeds(folder)
    assert seeds
    return seeds


def is_expected(error: Any) -> bool:
    """Whether an input may end so."""
    from elmoe.errors import ElmoeError

    return isinstance(error, ElmoeError)
