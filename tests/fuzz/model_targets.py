"""Targets that are parts of models: manifests and data of stores, checkpoints, GGUF, tokenizers, templates and prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from tests.checkpoints import tiny_config, write_checkpoint
from tests.fuzz.target import Target, nothing

SMALL = dict(
    vocab_size=261, hidden_size=32, moe_intermediate_size=32, intermediate_size=32, num_hidden_layers=2, num_experts=2,
    num_experts_per_tok=1, num_attention_heads=2, num_key_value_heads=1, mlp_only_layers=[1],
)  # fmt: skip


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

TARGETS = (
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
    Target("template", "text", nothing, lambda _: [text.encode() for text in TEMPLATES], _run_template),
    Target("prompts", "text", nothing, lambda _: [text.encode() for text in PROMPTS], _run_prompts),
)  # fmt: skip
