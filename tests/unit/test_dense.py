"""Dense families: the same text on both backends and readers, GGUF files with permuted rows, and what is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import SamplingParameters
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.gguf_file import GgufFile
from elmoe.convert.head_rows import rows_of_halves, rows_of_neighbours
from elmoe.convert.losses import FormatChoice
from elmoe.convert.source import open_source
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import ConvertError, ModelError, RequestError, TraceError
from elmoe.models import FAMILIES, spec_of_config
from elmoe.models.gguf import gguf_family
from elmoe.models.support import check_supported
from elmoe.models.tensors import tensors
from elmoe.store import open_direct, open_store
from elmoe.trace import TraceRecorder
from tests.checkpoints import random_weights, write_checkpoint

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=300, hidden_size=96, intermediate_size=160,
    num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, rope_theta=1e4,
    max_position_embeddings=128, tie_word_embeddings=True, hidden_act="silu", attention_bias=False, mlp_bias=False,
    eos_token_id=0,
)  # fmt: skip
QWEN3 = LLAMA | dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", tie_word_embeddings=False, num_key_value_heads=3,
    use_sliding_window=False,
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
REQUESTS = [
    Request((5, 6, 7), 12),
    Request(tuple(range(1, 40)), 9),
    Request((9,), 8, SamplingParameters(temperature=0.8, seed=3)),
]


def store(folder, config):
    convert_checkpoint(write_checkpoint(folder / "source", config), folder / "store")
    return folder / "store"


@CONFIGS
def test_every_way_to_serve_gives_the_same_text(tmp_path, config):
    path, outputs = store(tmp_path, config), []
    for reader in (open_store(path), open_direct(path)):
        with reader:
            for backend in (bitslice, kernels):
                for changes in (
                    {"mode": "plain", "batch": 3}, {"mode": "elastic"}, {"mode": "cache", "fast_memory": 0.5, "batch": 2},
                    {"fast_memory": 64 << 20, "prefill_chunk": 7},
                ):  # fmt: skip
                    engine = Engine(reader, backend, EngineOptions(keep_kv_digest=True, **changes))
                    outputs.append(engine.generate(REQUESTS)[0])
                    assert engine.options.mode == "plain" and engine.statistics.drafted == 0
                    assert engine.statistics.committed == sum(len(result.tokens) for result in outputs[-1])
    assert all(output == outputs[0] for output in outputs)
    assert all(result.kv_digest for result in outputs[0])


def test_drafts_are_refused_by_name(tmp_path):
    with open_store(store(tmp_path, LLAMA)) as reader:
        for changes in ({"draft_length": 3}, {"draft_top_k": 1}):
            with pytest.raises(RequestError, match=rf"{next(iter(changes))} is .*no experts"):
                Engine(reader, bitslice, EngineOptions(**changes))


def test_there_is_no_routing_to_record(tmp_path):
    with pytest.raises(TraceError, match="a llama model has no experts"):
        TraceRecorder(tmp_path / "trace.parquet", spec_of_config(LLAMA))
    assert not list(tmp_path.iterdir())


@CONFIGS
def test_gguf_and_back(tmp_path, config):
    path = store(tmp_path, config)
    with open_store(path) as reader:
        export_store(reader, tmp_path / "model.gguf")
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    assert (path / "dense.bin").read_bytes() == (tmp_path / "back" / "dense.bin").read_bytes()
    with open_store(path) as one, open_store(tmp_path / "back") as other:
        assert one.spec == other.spec


@CONFIGS
def test_a_gguf_file_without_the_width_of_heads_divides_the_hidden_size_as_llama_cpp_does(tmp_path, config):
    """transformers gives Qwen3 128 where a config.json has none."""
    with open_store(store(tmp_path, config | {"head_dim": 16, "num_attention_heads": 6})) as reader:
        export_store(reader, tmp_path / "model.gguf")
        without = tuple(f"{config['model_type']}.attention.{key}_length" for key in ("key", "value"))
        assert open_source(rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", without=without)).spec == reader.spec


def test_rows_of_heads_are_permuted_as_llama_cpp_has_them(tmp_path):
    """convert_hf_to_gguf.py: reshape to (heads, 2, half, columns), swap the middle axes."""
    weights = random_weights(LLAMA)
    convert_checkpoint(write_checkpoint(tmp_path / "source", LLAMA, weights), tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        export_store(reader, tmp_path / "model.gguf")
        ours = reader.matrix("layers.1.query_key_value").dequantize()
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, heads, first in (("blk.1.attn_q.weight", 6, 0), ("blk.1.attn_k.weight", 2, 192)):
        found = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        rows = ours[first : first + heads * 32]
        assert np.array_equal(found, rows.reshape(heads, 2, 16, 96).swapaxes(1, 2).reshape(rows.shape))
    value = gguf.quants.dequantize(tensors["blk.1.attn_v.weight"].data, tensors["blk.1.attn_v.weight"].tensor_type)
    assert np.array_equal(value, ours[256:])


@CONFIGS
@pytest.mark.parametrize("step", [16, 80])
def test_rows_are_the_same_in_whatever_blocks_they_are_read(tmp_path, config, step):
    """Blocks begin within a head, and reach over the parts that are laid one below the other."""
    with open_store(store(tmp_path, config)) as reader:
        export_store(reader, tmp_path / "model.gguf")
        for source in (open_source(tmp_path / "source"), open_source(tmp_path / "model.gguf")):
            matrices = [one for one in tensors(source.spec) if one.kind == "matrix"]
            assert {"embedding", "layers.1.query_key_value"} <= {one.name for one in matrices}
            for tensor in matrices:
                ((piece, format),) = tensor.pieces(tensor.format(source.formats)).values()
                whole = reader.matrix(tensor.name).dequantize()
                for first in range(0, piece.shape[0], step):
                    last = min(first + step, piece.shape[0])
                    assert np.array_equal(source.matrix(piece, first, last, format).dequantize(), whole[first:last])


@pytest.mark.parametrize("head_dim", [2, 16, 64, 96])
def test_orders_of_rows_are_inverse(head_dim):
    rows = np.arange(5 * head_dim)
    assert np.array_equal(rows_of_halves(rows_of_neighbours(rows, head_dim), head_dim), rows)
    assert not np.array_equal(rows_of_neighbours(rows, 16), rows)


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' of a theta of 1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 64}}, "not below 'high_freq_factor'"),
        ({"mlp_bias": True}, "biases of feed-forwards"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"head_dim": 24}, "'head_dim' 24"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, named):
    config = {key: value for key, value in (LLAMA | changes).items()}
    if "rope_parameters" in changes:
        del config["rope_theta"]
    with pytest.raises(ModelError, match=named):
        check_supported(spec_of_config(config))


def test_a_gguf_architecture_is_not_a_family():
    families = FAMILIES.values()
    assert gguf_family({"general.architecture": "llama"}, families)[0].name == "llama"
    assert gguf_family({"general.architecture": "llama", "llama.expert_count": 0}, families)[0].name == "llama"
    assert gguf_family({"general.architecture": "llama", "llama.expert_count": 8}, families)[0].name == "mixtral"
    with pytest.raises(ModelError, match="'granitehybrid' is not supported") as caught:
        gguf_family({"general.architecture": "granitehybrid"}, families)
    known = "deepseek2, dots1, glm4moe, gpt-oss, granite, granitemoe, llama, olmoe, qwen2, qwen2moe, qwen3, qwen3moe"
    assert caught.value.hint == f"supported: {known}"


def rewritten(path, out, metadata=(), extra=(), kinds=None, without=()):
    """A GGUF file with more metadata and tensors (bytes are Q8_0), matrices in another type, or in those that ``kinds``
    gives by name, ``without`` some metadata and tensors."""
    source = GgufFile(path)
    writer = gguf.GGUFWriter(out, source.metadata["general.architecture"])
    for key, value in source.metadata.items():
        if key == "general.architecture" or key in dict(metadata) or key in without:
            continue
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(key, value)
    for key, value in metadata:
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}.get(type(value), writer.add_float32)
        add(key, value)
    for one in gguf.GGUFReader(path).tensors:
        if one.name in without:
            continue
        values, kind = gguf.quants.dequantize(one.data, one.tensor_type), one.tensor_type
        if one.tensor_type == gguf.GGMLQuantizationType.Q8_0 and kinds is not None:
            kind = kinds(one.name) if callable(kinds) else kinds
        data = one.data if kind == one.tensor_type else gguf.quants.quantize(values, kind)
        writer.add_tensor(one.name, data, raw_dtype=kind)
    for name, values in extra:
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if values.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_scalings_of_a_gguf_file_are_refused_by_name(tmp_path):
    with open_store(store(tmp_path, LLAMA)) as reader:
        export_store(reader, tmp_path / "model.gguf")
    for index, (metadata, extra, named) in enumerate(
        (
            ([("llama.rope.scaling.type", "yarn")], [], r"llama\.rope\.scaling\.factor' is missing"),
            ([("llama.rope.scaling.type", "longrope")], [], r"llama\.rope\.scaling\.type' is 'longrope'"),
            ([("llama.rope.scaling.type", "none"), ("llama.rope.scaling.factor", 4.0)], [], r"rope\.scaling\.factor' is 4"),
            ([("llama.rope.scaling.attn_factor", 2.0)], [], r"llama\.rope\.scaling\.attn_factor' is 2"),
            ([], [("rope_freqs.weight", np.linspace(1, 7, 16, dtype=np.float32))], r"rope_freqs\.weight' scales"),
            ([], [("rope_freqs.weight", np.ones(15, np.float32))], r"rope_freqs\.weight' scales"),
            ([], [("rope_freqs.weight", np.zeros(16, np.float32))], r"rope_freqs\.weight' holds"),
            ([("llama.rope.scaling.type", "linear")], [("rope_freqs.weight", np.ones(16, np.float32))], r"both scale"),
            ([], [("blk.0.attn_q.bias", np.ones(192, np.float32))], r"does not have: 'blk\.0\.attn_q\.bias'"),
        )
    ):
        path = rewritten(tmp_path / "model.gguf", tmp_path / f"{index}.gguf", metadata, extra)
        with pytest.raises(ConvertError, match=named):
            convert_checkpoint(path, tmp_path / "other")


def values_of(path):
    return {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind,least", [("Q5_1", 40), ("BF16", 40)])
def test_other_types_are_quantised_anew_and_the_loss_is_told(tmp_path, kind, least):
    kind = gguf.GGMLQuantizationType[kind]
    with open_store(store(tmp_path, LLAMA)) as reader:
        export_store(reader, tmp_path / "model.gguf")
    lines = []
    path = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", kinds=kind)
    convert_checkpoint(path, tmp_path / "other", told=lines.extend)
    (line,) = lines
    assert line.startswith(f"{kind.name} -> nested8: ") and line.endswith(" dB (22 tensors)")
    told = float(line.split(": ")[1].split(" dB")[0])
    values = values_of(path)["token_embd.weight"]
    with open_store(tmp_path / "other") as reader:
        stored = reader.matrix("embedding").dequantize()
    error = np.square(stored - values).sum() / np.square(values).sum()
    assert told > least and -10 * np.log10(error) == pytest.approx(told, abs=2)


WIDE = dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=4, intermediate_size=256)
"""Columns that fill the blocks of 256 of the types that have such."""


@pytest.mark.parametrize("choice", ["Q8_0", "Q4_0", "Q4_1", "affine4_k", "table4_nl", "table4_xs", "table4_mx", "planes6"])
@CONFIGS
def test_exact_types_keep_their_values_and_blocks(tmp_path, config, choice):
    """The file's values, with queries and keys in the checkpoint's order; an export gives the file's blocks again."""
    formats, lines = None if choice[0] == "Q" else FormatChoice.parse([choice]), []
    convert_checkpoint(write_checkpoint(tmp_path / "source", config | WIDE), tmp_path / "store", choice=formats)
    with open_store(tmp_path / "store") as reader:
        export_store(reader, tmp_path / "model.gguf")
    path = tmp_path / "model.gguf"
    if choice[0] == "Q":
        path = rewritten(path, tmp_path / "other.gguf", kinds=gguf.GGMLQuantizationType[choice])
    convert_checkpoint(path, tmp_path / "back", told=lines.extend)
    (line,) = lines
    assert ": exact (" in line
    same_values_and_blocks(path, tmp_path, config)


@CONFIGS
def test_queries_keys_and_values_of_several_types(tmp_path, config):
    """As files named Q4_K_M have them."""
    with open_store(store(tmp_path, config | WIDE)) as reader:
        export_store(reader, tmp_path / "model.gguf")
    kinds = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q8_0", "ffn_down": "Q4_1", "token_embd": "Q8_0"}

    def kind_of(name):
        found = [kind for role, kind in kinds.items() if f"{role}." in name]
        return gguf.GGMLQuantizationType[found[0] if found else "Q4_0"]

    path, lines = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", kinds=kind_of), []
    convert_checkpoint(path, tmp_path / "back", told=lines.extend)
    assert len(lines) == 3 and all(": exact (" in line for line in lines)
    same_values_and_blocks(path, tmp_path, config)
    with open_store(tmp_path / "back") as reader:
        assert reader.formats["layers.2.query_key_value"] == "affine4_0+affine4_1+nested8"
        assert reader.formats["layers.2.dense_ffn"] == "affine4_0+affine4_0+affine4_1"
        first, second = (Engine(reader, backend, EngineOptions()).generate(REQUESTS)[0] for backend in (bitslice, kernels))
        assert first == second


def same_values_and_blocks(path, tmp_path, config):
    values, heads = values_of(path), {"query": 8, "key": 4, "value": 4}
    with open_store(tmp_path / "back") as reader:
        found = reader.matrix("layers.2.query_key_value").dequantize()
        expected = []
        for name, count in heads.items():
            rows = values[f"blk.2.attn_{name[0]}.weight"].reshape(count, -1, 2, 256)
            order = rows.swapaxes(1, 2) if name != "value" and config is LLAMA else rows
            expected.append(order.reshape(-1, 256))
        assert np.array_equal(found, np.concatenate(expected))
        assert np.array_equal(reader.matrix("embedding").dequantize(), values["token_embd.weight"])
        export_store(reader, tmp_path / "again.gguf")
    first, again = ({one.name: one for one in gguf.GGUFReader(one).tensors} for one in (path, tmp_path / "again.gguf"))
    assert first.keys() == again.keys()
    for name, one in first.items():
        assert one.tensor_type == again[name].tensor_type and np.array_equal(one.data, again[name].data), name
