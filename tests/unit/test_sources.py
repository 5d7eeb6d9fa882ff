"""What a store or a checkpoint is taken for: files in place of folders, sources that disagree, tensors that are too many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from elmoe.cli.main import cli
from elmoe.convert import convert_checkpoint
from elmoe.errors import ConvertError, StoreError
from elmoe.store import open_store, resolve_store
from tests.checkpoints import random_weights, tiny_config, write_checkpoint, write_safetensors

NORM = "model.layers.1.input_layernorm.weight"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def in_both_shards(folder: Path, named: str) -> Path:
    """A checkpoint with a tensor in two shards, of ones in the first and twos in the second; the index names one of them."""
    config = tiny_config()
    weights = random_weights(config)
    names = sorted(weights)
    parts = [{name: weights[name] for name in names[index::2]} for index in (0, 1)]
    index = {name: shard for part, shard in zip(parts, SHARDS, strict=True) for name in part} | {NORM: named}
    for value, part in zip((1, 2), parts, strict=True):
        part[NORM] = np.full(48, value, np.float32)
    write_checkpoint(folder, config)
    (folder / "model.safetensors").unlink()
    for part, shard in zip(parts, SHARDS, strict=True):
        write_safetensors(folder / shard, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("number", [0, 1])
def test_the_index_decides_which_shards_tensor_counts(tmp_path, number):
    convert_checkpoint(in_both_shards(tmp_path / "source", SHARDS[number]), tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        assert (reader.array("layers.1.attention_norm") == number + 1).all()


def test_a_tensor_that_is_not_where_the_index_has_it_is_named(tmp_path):
    source = in_both_shards(tmp_path / "source", SHARDS[0])
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    name = "model.embed_tokens.weight"
    index[name] = next(shard for shard in SHARDS if shard != index[name])
    path.write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ConvertError, match=rf"'{name}' is not in '{index[name]}', where the index has it"):
        convert_checkpoint(source, tmp_path / "store")


def test_the_index_counts_beside_a_single_file(tmp_path):
    source = in_both_shards(tmp_path / "source", SHARDS[1])
    write_safetensors(source / "model.safetensors", {"other": np.ones(4, np.float32)})
    convert_checkpoint(source, tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        assert (reader.array("layers.1.attention_norm") == 2).all()


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.shared_expert.gate_proj.weight", "visual.x"]
)
def test_tensors_that_the_model_does_not_have_are_refused_by_name(tmp_path, name):
    config = tiny_config()
    source = write_checkpoint(tmp_path / "source", config, random_weights(config) | {name: np.ones((64,), np.float32)})
    with pytest.raises(ConvertError, match=f"tensors that a qwen3_moe model does not have: '{name}'"):
        convert_checkpoint(source, tmp_path / "store")


def test_tensors_that_are_constants_or_tied_are_left_out_and_told(tmp_path):
    weights = random_weights(tiny_config())
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    extra = head | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    source = write_checkpoint(tmp_path / "source", tiny_config(), weights | extra)
    assert set(convert_checkpoint(source, tmp_path / "store")) == set(extra)
    told = CliRunner().invoke(cli, ["convert", str(source), str(tmp_path / "again")], catch_exceptions=False)
    assert "left out, since the model runs without them: lm_head.weight, model.layers.0.self_attn.rotary" in told.stderr


def test_a_head_that_differs_from_tied_embeddings_is_refused(tmp_path, monkeypatch):
    """transformers takes such a head, and does not tie."""
    monkeypatch.setattr("elmoe.convert.source.TIED_ROWS", 128)
    weights = random_weights(tiny_config())
    head = weights["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    source = write_checkpoint(tmp_path / "source", tiny_config(), weights | {"lm_head.weight": head})
    with pytest.raises(ConvertError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'") as caught:
        convert_checkpoint(source, tmp_path / "store")
    assert "set it to false" in caught.value.hint and not list(tmp_path.glob("store*"))
    untied = tiny_config(tie_word_embeddings=False)
    convert_checkpoint(write_checkpoint(tmp_path / "untied", untied, weights | {"lm_head.weight": head}), tmp_path / "store")


def test_layers_that_predict_further_tokens_are_of_families_that_have_them(tmp_path):
    """Elsewhere the key would drop real layers where their number is too small."""
    weights = random_weights(tiny_config())
    fewer = tiny_config(num_hidden_layers=2, num_nextn_predict_layers=1)
    source = write_checkpoint(tmp_path / "source", fewer, weights)
    with pytest.raises(ConvertError, match=r"tensors that a qwen3_moe model does not have: 'model\.layers\.2"):
        convert_checkpoint(source, tmp_path / "store")


def test_weights_that_are_not_safetensors_are_told_apart_from_missing_ones(tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=r"weights in pytorch_model.bin") as caught:
        convert_checkpoint(source, tmp_path / "store")
    assert "save_pretrained" in caught.value.hint


def test_what_is_given_in_place_of_a_store_is_said(tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    (tmp_path / "text").write_text("x")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "b.gguf").write_bytes(b"GGUF")
    demo = resolve_store("demo")
    shutil.copy(demo / "manifest.json", tmp_path / "manifest.json")
    cases = {
        tmp_path / "a.gguf": ("is a GGUF file", "elmoe convert FILE.gguf STORE"),
        source / "model.safetensors": ("is a safetensors file", "the folder it is in"),
        tmp_path / "manifest.json": ("is a file of a store", "the directory it is in"),
        demo / "dense.bin": ("is a file of a store", "the directory it is in"),
        tmp_path / "pointer": ("is a Git LFS pointer", "git lfs pull"),
        tmp_path / "text": ("is a file of another kind, not the directory of a store", "give a GGUF file"),
        source: ("is a checkpoint, not a store", "elmoe convert CHECKPOINT STORE"),
        tmp_path / "none": ("there is no file or folder", "demo"),
        Path("x" * 300): ("there is no file or folder", "demo"),
        Path("a\0b"): ("there is no file or folder", "demo"),
        "": ("the name of the store is empty", "demo"),
        "llama3:8": ("there is no file or folder", "give a GGUF file"),
        "http://localhost:8000": ("there is no file or folder", "elmoe chat http://localhost:8000"),
        "models/x.gguf": ("there is no file or folder", "give a GGUF file"),
        tmp_path / "files": ("is a folder of GGUF files", "files/b.gguf"),
        "127.0.0.1:8080": ("there is no file or folder", "elmoe chat http://127.0.0.1:8080"),
        "owner/model-7b": ("there is no file or folder", "fetch it first"),
    }
    for path, (told, hint) in cases.items():
        with pytest.raises(StoreError, match=told) as caught:
            open_store(path)
        assert hint in str(caught.value.hint)
