"""Models of latent attention: the bytes of their cache and stores, prefixes, drafts, and what GGUF files say of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import gguf
import msgspec
import numpy as np
import pytest

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.latent_rows import FusedRows
from elmoe.convert.source import open_source
from elmoe.engine.cache_layout import PAGE_POSITIONS, layout_of
from elmoe.engine.engine import Engine
from elmoe.engine.kv_cache import PagedCache
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import ConvertError
from elmoe.models import spec_of_config
from elmoe.models.deepseek2 import SIGMOID, SOFTMAX, gating
from elmoe.models.load import model_of_config
from elmoe.models.tensors import feed_forwards, tensors
from elmoe.store import open_store
from elmoe.store.layout import record_sections, tensor_sections
from elmoe.store.synthetic import synthesize
from tests.checkpoints import write_checkpoint
from tests.family_configs import CONFIGS
from tests.tiny import TinyReader
from tests.unit.test_dense import rewritten, values_of

SPEC = spec_of_config(CONFIGS["deepseek_v3"])
TEXT = tuple(np.random.default_rng(0).integers(1, 300, 400).tolist())


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if "kv_lora_rank" in config])
def test_the_cache_takes_latent_and_rotary_key_once(name):
    """(rank + rotary) x 2 bytes per position and layer, in arrays, pages and forecasts."""
    spec, config = spec_of_config(CONFIGS[name]), CONFIGS[name]
    position = 3 * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * 2
    assert spec.kv_bytes_per_position == position and len(spec.layers) == 3
    cache = PagedCache(spec, 2, 200)
    arrays = cache.kernels.keys, cache.kernels.values
    assert cache.pages == 8 and sum(array.nbytes for array in arrays) == 8 * PAGE_POSITIONS * position
    assert cache.page_bytes == layout_of(spec).page_bytes == PAGE_POSITIONS * position
    engine = Engine(TinyReader(spec), kernels, EngineOptions(mode="plain", batch=1))
    engine.add(Request(TEXT[:130], 10, ignore_eos=True))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.cache.bytes_in_use)
    assert most == 3 * PAGE_POSITIONS * position and engine.cache.bytes_in_use == 0


def test_texts_that_begin_alike_share_their_latents():
    options = EngineOptions(mode="elastic", fast_memory=0.4, draft_length=3, keep_kv_digest=True, prefix_cache=True)
    reader = TinyReader(SPEC)
    engine = Engine(reader, kernels, options)
    for prompt, cached in ((TEXT[:200], 0), (TEXT[:200], 192), (TEXT[:129], 128), (TEXT[:100] + (1, 2) * 60, 64)):
        request = Request(prompt, 6, SamplingParameters(0.8, seed=1), ignore_eos=True)
        results, _ = engine.generate([request])
        assert results == Engine(reader, kernels, replace(options, prefix_cache=False)).generate([request])[0]
        assert results[0].cached_tokens == cached


def test_drafts_batches_chunks_and_threads_change_nothing():
    """A sample of the losslessness grid, with groups of experts: tokens, log-probabilities and bytes of the cache."""
    reader = TinyReader(SPEC)
    requests = [
        Request(TEXT[start : start + length], 20, SamplingParameters(temperature, seed=start), ignore_eos=True)
        for start, length, temperature in ((0, 5, 0.0), (7, 150, 0.8), (3, 62, 0.0), (90, 1, 0.8))
    ]
    kernels.set_threads(1)
    expected = Engine(reader, kernels, EngineOptions(mode="plain", batch=1, keep_kv_digest=True)).generate(requests)[0]
    rejected = 0
    for draft, budget, batch, threads, chunk in product((1, 4, 8), (0.0, 0.5), (1, 4), (1, 3), (None, 9)):
        kernels.set_threads(threads)
        options = EngineOptions(
            "elastic", budget, draft_length=draft, batch=batch, prefill_chunk=chunk, keep_kv_digest=True
        )  # fmt: skip
        results, statistics = Engine(reader, kernels, options).generate(requests)
        rejected += statistics.rejected
        assert results == expected, (draft, budget, batch, threads, chunk)
    kernels.set_threads(2)
    assert rejected > 0


@pytest.mark.parametrize(
    "name", ["deepseek_v2", "deepseek_v2_groups", "deepseek_v3", "glm4_moe_lite", "glm4_moe_lite_options"]
)
def test_sizes_of_a_store_are_a_closed_form(tmp_path, name):
    """Weights times 8.5 bits, routers, norms and biases in float32; rows and columns are filled up to whole blocks."""
    model = model_of_config(CONFIGS[name], "tiny", "config.json")
    synthesize(tmp_path / "store", model.spec)
    floats, padding = 0, 0.0
    for tensor in tensors(model.spec):
        if tensor.kind == "floats":
            floats += 4 * int(np.prod(tensor.shape))
        else:
            rows, columns = tensor.shape
            padding += (-(-rows // 16) * 16 * (-(-columns // 32) * 32) - rows * columns) * 8.5 / 8
    others = sum(8.5 / 8 * (layer.dense_parameters + layer.shared_parameters) for layer in model.layers)
    others += sum(4 * layer.router_parameters for layer in model.layers)
    with open_store(tmp_path / "store") as reader:
        sections = [tensor_sections(tensor, reader.formats.get(tensor.name, "float32")) for tensor in tensors(model.spec)]
        stored = sum(sum(one.values()) for one in sections)
        assert stored == model.dense_bytes - others + floats + padding
        records = [record_sections(part) for part in feed_forwards(model.spec) if part.kind != "expert"]
        kept = stored + sum(sum(one.values()) for one in records)
        assert kept <= reader.dense_bytes <= kept + 4096 * sum(map(len, sections))


def test_sizes_of_matrices_in_formats_of_their_own():
    model = model_of_config(CONFIGS["deepseek_v2"], "tiny", "config.json")
    smaller = msgspec.structs.replace(model, formats={"layers.1.key_up": "affine4"})
    assert model.dense_bytes - smaller.dense_bytes == pytest.approx(4 * 32 * 32 * (8.5 - 4.625) / 8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
        convert_checkpoint(write_checkpoint(folder / f"{name}.source", CONFIGS[name]), folder / name)
        with open_store(folder / name) as reader:
            export_store(reader, folder / f"{name}.gguf")
    return folder


def test_families_of_one_architecture_are_told_apart(exported):
    for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
        assert open_source(exported / f"{name}.gguf").spec.family == name
    metadata = gguf.GGUFReader(exported / "deepseek_v2.gguf").fields
    assert metadata["deepseek2.attention.key_length"].contents() == 48
    assert metadata["deepseek2.attention.key_length_mla"].contents() == 48
    assert metadata["deepseek2.rope.scaling.yarn_log_multiplier"].contents() == pytest.approx(0.0707)


def test_what_a_file_does_not_say_is_what_llama_cpp_takes(exported, tmp_path):
    without = [f"deepseek2.expert_{name}" for name in ("weights_norm", "weights_scale", "group_count", "group_used_count")]
    router = open_source(rewritten(exported / "glm4_moe_lite.gguf", tmp_path / "a.gguf", without=without)).spec.moe(1).router
    assert (router.normalize, router.scaling, router.groups, router.kept_groups) == (False, 1.0, 1, 1)
    flash = {"deepseek2.block_count": 47, "deepseek2.vocab_size": 154880}
    assert gating(flash) == SIGMOID and gating(flash | {"deepseek2.vocab_size": 102400}) == SOFTMAX
    assert gating(flash | {"deepseek2.expert_gating_func": 1}) == SOFTMAX


def test_the_shapes_are_those_of_llama_cpp(exported):
    """The keys' part transposed, both parts by head; what ``conversion/deepseek.py`` of llama.cpp makes of ``kv_b_proj``."""
    found = values_of(exported / "deepseek_v2.gguf")
    assert found["blk.1.attn_k_b.weight"].shape == (4, 32, 32) and found["blk.1.attn_v_b.weight"].shape == (4, 16, 32)
    assert found["blk.1.attn_kv_a_mqa.weight"].shape == (48, 64) and found["blk.1.attn_q.weight"].shape == (4 * 48, 64)
    source = open_source(exported / "deepseek_v2.source")
    whole = source._checkpoint.rows(["model.layers.1.self_attn.kv_b_proj.weight"]).reshape(4, 32 + 16, 32)
    assert np.abs(found["blk.1.attn_k_b.weight"] - whole[:, :32].transpose(0, 2, 1)).max() < 0.01 * np.abs(whole).max()
    assert np.abs(found["blk.1.attn_v_b.weight"] - whole[:, 32:]).max() < 0.01 * np.abs(whole).max()


@pytest.mark.parametrize("name", ["deepseek_v2", "glm4_moe_lite"])
def test_older_files_with_the_whole_projection_are_read(exported, tmp_path, name):
    """Values are taken bit for bit; keys are transposed and quantised anew, and the loss is told."""
    path, spec = exported / f"{name}.gguf", spec_of_config(CONFIGS[name])
    attention, rows = spec.layers[0].attention, FusedRows.of(spec)
    raw, extra, without = {one.name: one.data for one in gguf.GGUFReader(path).tensors}, [], []
    for layer in range(len(spec.layers)):
        keys, values = (f"blk.{layer}.attn_{part}_b.weight" for part in "kv")
        turned = np.ascontiguousarray(values_of(path)[keys].transpose(0, 2, 1))
        plain = gguf.quants.quantize(turned, gguf.GGMLQuantizationType.Q8_0)
        whole = np.concatenate([plain, raw[values]], axis=1).reshape(rows.shape[0], -1)
        extra.append((f"blk.{layer}.attn_kv_b.weight", whole))
        without += [keys, values]
    lengths = [
        ("deepseek2.attention.head_count_kv", attention.heads), ("deepseek2.attention.key_length", attention.query_dim),
        ("deepseek2.attention.value_length", attention.value_dim),
    ]  # fmt: skip
    without += [f"deepseek2.attention.{part}_length_mla" for part in ("key", "value")]
    older = rewritten(path, tmp_path / "older.gguf", lengths, extra, without=without)
    convert_checkpoint(older, tmp_path / "store")
    source = open_source(older)
    assert source.spec == spec and source.formats["layers.1.key_up"] == "nested8"
    with open_store(exported / name) as one, open_store(tmp_path / "store") as other:
        for layer in range(len(spec.layers)):
            ours, theirs = (reader.matrix(f"layers.{layer}.value_up") for reader in (one, other))
            assert np.array_equal(ours.dequantize(), theirs.dequantize())
            ours, theirs = (reader.matrix(f"layers.{layer}.key_up").dequantize() for reader in (one, other))
            assert 0 < np.abs(ours - theirs).max() < 0.02 * np.abs(ours).max()
    both = rewritten(path, tmp_path / "both.gguf", extra=extra[:1])
    with pytest.raises(ConvertError, match=r"does not have: 'blk\.0\.attn_kv_b\.weight'"):
        open_source(both).check()


def test_what_files_cannot_mean_is_refused_by_name(exported, tmp_path):
    sigmoid, softmax = exported / "glm4_moe_lite.gguf", exported / "deepseek_v2.gguf"
    for index, (path, metadata, without, named) in enumerate((
        (softmax, [], ["deepseek2.rope.scaling.yarn_log_multiplier"], r"yarn_log_multiplier' is None"),
        (softmax, [("deepseek2.expert_group_count", 4), ("deepseek2.expert_group_used_count", 2)], [], r"group_count' is 4"),
        (softmax, [], ["deepseek2.leading_dense_block_count"], r"leading_dense_block_count'"),
        (softmax, [("deepseek2.attention.key_length", 100)], [], r"attention\.key_length' is 100"),
        (softmax, [("deepseek2.attention.temperature_scale", 0.1)], [], r"temperature_scale' is not supported"),
        (softmax, [], ["deepseek2.rope.dimension_count"], r"rope\.dimension_count' is missing"),
        (softmax, [("deepseek2.expert_gating_func", 3)], [], "'deepseek2' with experts is not supported"),
        (sigmoid, [("tokenizer.ggml.pre", "kimi-k2")], [], "'deepseek2' with experts is not supported"),
        (sigmoid, [("deepseek2.expert_gating_func", 1)], [], r"expert_weights_norm' is True"),
        (sigmoid, [("deepseek2.expert_gating_func", 1)], ["deepseek2.expert_weights_norm"], r"exp_probs_b\.bias"),
        (sigmoid, [], ["blk.1.attn_v_b.weight"], r"attn_v_b\.weight' is missing"),
    )):  # fmt: skip
        broken = rewritten(path, tmp_path / f"{index}.gguf", metadata, without=without)
        with pytest.raises(ConvertError, match=named):
            convert_checkpoint(broken, tmp_path / "other")


def test_a_configuration_and_weights_that_disagree_name_both(tmp_path):
    folder = write_checkpoint(tmp_path / "source", CONFIGS["deepseek_v2"])
    text = (folder / "config.json").read_text().replace('"v_head_dim": 16', '"v_head_dim": 32')
    (folder / "config.json").write_text(text)
    with pytest.raises(ConvertError, match=r"o_proj\.weight' has shape \[64, 64\], the config says \[64, 128\]|kv_b_proj"):
        open_source(folder).check()
