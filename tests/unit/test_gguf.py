"""Stores to GGUF and back, bit for bit, and GGUF files of other programs."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as TensorType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_file import GgufFile
from elmoe.convert.gguf_tokenizer import describe, rebuild
from elmoe.errors import ConvertError
from elmoe.models import family_of, spec_of_config
from elmoe.models.tensors import PROJECTIONS
from elmoe.models.tensors import tensors as model_tensors
from elmoe.store import open_store
from tests.checkpoints import expert_name, write_checkpoint
from tests.gguf_files import (
    byte_tokenizer,
    content,
    export,
    qwen_tokenizer,
    random_parts,
    tensors,
    wide_config,
    write_gguf,
)

TEXTS = ("The whale's tail,  and 12345 fish!\n\n  x", "naïve e\u0301tude — 東京 🐋\tend", "def f(x):\r\n    return x", " ")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "mlp_only_layers": [1], "eos_token_id": [0, 7]},
        {"decoder_sparse_step": 2, "num_hidden_layers": 4, "eos_token_id": [9, 0, 3], "rope_theta": 1e6},
        {"head_dim": 32, "num_key_value_heads": 4, "vocab_size": 301, "rms_norm_eps": 1e-5, "eos_token_id": None},
    ],
)
def test_store_to_gguf_to_store(tmp_path, changes):
    source = write_checkpoint(tmp_path / "source", wide_config(**changes))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }} é")
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>", "pad_token": {"content": "<pad>"}}')
    convert_checkpoint(source, tmp_path / "store")
    export(tmp_path / "store", tmp_path / "model.gguf")
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    assert content(tmp_path / "store") == content(tmp_path / "back")
    with open_store(tmp_path / "back") as reader:
        assert reader.manifest.special_tokens == {"bos_token": "<s>", "pad_token": "<pad>"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["back", "model.gguf", "source", "store"]


def test_the_demo_goes_there_and_back(tmp_path):
    export("demo", tmp_path / "demo.gguf")
    convert_checkpoint(tmp_path / "demo.gguf", tmp_path / "store")
    with open_store("demo") as demo:
        before = {name: data for name, data in content(demo.path).items() if name != "MODEL_CARD.md"}
    after = content(tmp_path / "store")
    assert before.keys() == after.keys()
    for name, data in after.items():
        assert before[name] == data, name


def test_gguf_to_store_to_gguf(tmp_path):
    """Codes of -128, zero and subnormal scales: the same bytes come out, as the package's own reader sees them."""
    first = write_gguf(tmp_path / "first.gguf", random_parts())
    convert_checkpoint(first, tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        reader.verify()
        assert reader.matrix("embedding").codes.min() == -128
    assert tensors(export(tmp_path / "store", tmp_path / "second.gguf")) == tensors(first)


@pytest.mark.parametrize("dtype", [TensorType.F32, TensorType.F16, TensorType.BF16])
def test_other_types_are_quantised_as_a_checkpoint_is(tmp_path, dtype):
    parts = random_parts(dtype)
    convert_checkpoint(write_gguf(tmp_path / "model.gguf", parts), tmp_path / "store")
    config, weights = wide_config(), {}
    spec, family = spec_of_config(config), family_of(config)

    def float32(name: str) -> np.ndarray:
        kind, data = parts[name]
        if kind == TensorType.BF16:
            return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return data.astype(np.float32)

    for tensor in model_tensors(spec):
        for part in tensor.parts:
            theirs, ours = (names[part.role].format(layer=tensor.layer) for names in (family.names, family.gguf.names))
            weights[theirs] = float32(ours)
    for layer in range(len(spec.layers)):
        for projection in PROJECTIONS:
            stacked = float32(f"blk.{layer}.ffn_{projection}_exps.weight")
            weights |= {expert_name(config, layer, e, projection): values for e, values in enumerate(stacked)}
    convert_checkpoint(write_checkpoint(tmp_path / "source", config, weights), tmp_path / "other")
    same = [name for name in content(tmp_path / "store") if name.endswith((".bin", ".experts"))]
    assert len(same) == 4
    assert all(content(tmp_path / "store")[name] == content(tmp_path / "other")[name] for name in same)


def test_split_files(tmp_path):
    parts = random_parts()
    convert_checkpoint(write_gguf(tmp_path / "whole.gguf", parts), tmp_path / "store")
    names = list(parts)
    for index in range(2):
        write_gguf(tmp_path / f"m-0000{index + 1}-of-00002.gguf", {name: parts[name] for name in names[index::2]})
    convert_checkpoint(tmp_path / "m-00001-of-00002.gguf", tmp_path / "split")
    assert content(tmp_path / "split") == content(tmp_path / "store")
    with pytest.raises(ConvertError, match="not the first part"):
        convert_checkpoint(tmp_path / "m-00002-of-00002.gguf", tmp_path / "other")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ConvertError, match="m-00002-of-00002"):
        convert_checkpoint(tmp_path / "m-00001-of-00002.gguf", tmp_path / "other")


def test_our_reader_sees_what_the_package_sees(tmp_path):
    path = export("demo", tmp_path / "demo.gguf")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert field.contents() == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key
    for one in theirs.tensors:
        tensor = ours.tensor(one.name)
        assert (tensor.start, tensor.bytes, tensor.shape[::-1]) == (one.data_offset, one.n_bytes, tuple(one.shape))


@pytest.mark.parametrize("make,pre", [(byte_tokenizer, "gpt-2"), (qwen_tokenizer, "qwen2")])
def test_tokenizers_are_rebuilt(tmp_path, make, pre):
    """Without the carried tokenizer.json, as other programs write it."""
    path = write_gguf(tmp_path / "model.gguf", random_parts(), tokenizer=make())
    assert GgufFile(path).metadata["tokenizer.ggml.pre"] == pre
    convert_checkpoint(path, tmp_path / "store")
    before, after = Tokenizer.from_str(make().decode()), Tokenizer.from_file(str(tmp_path / "store" / "tokenizer.json"))
    for text in (*TEXTS, "a<|im_start|>b<think> the and  <|endoftext|>"):
        ids = before.encode(text).ids
        assert after.encode(text).ids == ids
        for skip in (False, True):
            assert after.decode(ids, skip_special_tokens=skip) == before.decode(ids, skip_special_tokens=skip)
    convert_checkpoint(export(tmp_path / "store", tmp_path / "again.gguf"), tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "store")


def test_a_begin_token_comes_back():
    tokenizer = Tokenizer.from_str(byte_tokenizer().decode())
    described = describe(byte_tokenizer(), 300)
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": described.tokens,
        "tokenizer.ggml.token_type": described.types, "tokenizer.ggml.merges": ["! !"],
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0,
    }  # fmt: skip
    text = rebuild(metadata)
    assert Tokenizer.from_str(text.decode()).encode("ab").ids == [0, *tokenizer.encode("ab").ids]
    assert describe(text, 300).add_bos == 0
    with pytest.raises(ConvertError, match="id of the begin"):
        rebuild(metadata | {"tokenizer.ggml.bos_token_id": 300})


def test_a_given_tokenizer_mends_an_unknown_one(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_parts(), pre="kimi-k2")
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer())
    convert_checkpoint(path, tmp_path / "store", tokenizer=tmp_path / "tokenizer.json")
    assert (tmp_path / "store" / "tokenizer.json").read_bytes() == byte_tokenizer()


def test_a_file_ends_where_llama_cpp_ends(tmp_path):
    """The metadata name one end; control tokens whose texts say that they end are ends too, normal tokens are not."""
    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>"])
    tokenizer.add_tokens(["<EOT>"])
    ids = {name: tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>", "<|file_sep|>")}
    path = tmp_path / "model.gguf"
    write_gguf(path, random_parts(), tokenizer=tokenizer.to_str().encode(), eos=ids["<|im_end|>"])
    convert_checkpoint(path, tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        assert set(reader.spec.eos_tokens) == set(ids.values()) and reader.spec.eos_tokens[0] == ids["<|im_end|>"]


@pytest.mark.parametrize("eos", [None, 5, [5], [5, 7], [9, 0, 3]])
def test_ends_and_special_tokens_come_back_from_gguf(tmp_path, eos):
    source = write_checkpoint(tmp_path / "source", wide_config(eos_token_id=eos))
    tokenizer = Tokenizer.from_str((source / "tokenizer.json").read_text())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>", "bos_token": "a"}))
    convert_checkpoint(source, tmp_path / "store")
    export(tmp_path / "store", tmp_path / "model.gguf")
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "store")


@pytest.mark.parametrize(
    "metadata", [{"rope.scaling.factor": 1.0}, {"rope.scale_linear": 0.0}, {"attention.sliding_window": 64}]
)
def test_metadata_that_change_nothing_are_taken(tmp_path, metadata):
    convert_checkpoint(write_gguf(tmp_path / "plain.gguf", random_parts()), tmp_path / "plain")
    convert_checkpoint(write_gguf(tmp_path / "model.gguf", random_parts(), metadata=metadata), tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "plain")
