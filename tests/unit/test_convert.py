"""Converting checkpoints: what comes out, what is refused, and what a killed conversion leaves behind."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from elmoe import bitslice
from elmoe.bitslice import NestedMatrix
from elmoe.convert import convert_checkpoint
from elmoe.convert import source as source_module
from elmoe.convert.file_reading import SourceFile
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import ConvertError, ElmoeError, NumericsError
from elmoe.llm import load
from elmoe.models import spec_of_config
from elmoe.models.tensors import PROJECTIONS
from elmoe.store import open_store
from tests.checkpoints import expert_name, random_weights, tiny_config, write_checkpoint, write_safetensors

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 11422654\n"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def content(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "mlp_only_layers": [1]},
        {"decoder_sparse_step": 2, "num_hidden_layers": 4},
        {"head_dim": 32, "num_key_value_heads": 4, "eos_token_id": [0, 7]},
    ],
)
def test_a_store_holds_the_quantised_weights(tmp_path, changes):
    config = tiny_config(**changes)
    weights = random_weights(config)
    convert_checkpoint(write_checkpoint(tmp_path / "source", config, weights), tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        reader.verify()
        spec = reader.spec
        assert spec == spec_of_config(config)

        def same(ours: NestedMatrix, theirs: np.ndarray) -> bool:
            expected = NestedMatrix.from_weights(theirs)
            return np.array_equal(ours.dequantize(), expected.dequantize()) and np.array_equal(ours.hi, expected.hi)

        assert same(reader.matrix("embedding"), weights["model.embed_tokens.weight"])
        if not spec.tied_embeddings:
            assert same(reader.matrix("head"), weights["lm_head.weight"])
        prefix = "model.layers.1.self_attn."
        stacked = np.concatenate([weights[f"{prefix}{name}_proj.weight"] for name in "qkv"])
        assert same(reader.matrix("layers.1.query_key_value"), stacked)
        assert np.array_equal(reader.array("layers.0.query_norm"), weights["model.layers.0.self_attn.q_norm.weight"])
        for layer in range(len(spec.layers)):
            layout, addresses = reader.expert_layout(layer), reader.expert_addresses(layer)
            assert addresses.shape == (1 if layer in spec.dense_layers else spec.experts, 2)
            for expert in range(len(addresses)):
                matrices = bitslice.moe.expert_matrices(layout, addresses, expert, draft=False)
                for projection in PROJECTIONS:
                    assert same(matrices[projection], weights[expert_name(config, layer, expert, projection)])
        results, _ = Engine(reader, bitslice, EngineOptions(mode="plain")).generate([Request((5, 6, 7), 4)])
        assert len(results[0].tokens) >= 1


def test_records_are_aligned_for_direct_reads(tmp_path):
    convert_checkpoint(write_checkpoint(tmp_path / "source", tiny_config()), tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        for layer in reader.manifest.layers:
            layout = reader.expert_layout(layer.layer)
            assert layer.offset % 4096 == layout.msb_bytes % 4096 == layout.lsb_bytes % 4096 == 0
        assert (reader.expert_addresses(0) % 4096 == 0).all()


def test_shards_types_and_templates(tmp_path):
    config = tiny_config()
    weights = {name: values.astype(np.float16).astype(np.float32) for name, values in random_weights(config).items()}
    weights = {
        k: (v.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float16).astype(np.float32)
        for k, v in weights.items()
    }
    stores = []
    for index, (shards, dtype) in enumerate(((1, "F32"), (3, "F32"), (1, "F16"))):
        source = write_checkpoint(tmp_path / f"source{index}", config, weights, shards, dtype)
        convert_checkpoint(source, tmp_path / f"store{index}")
        stores.append({name: data for name, data in content(tmp_path / f"store{index}").items() if name != "manifest.json"})
    assert stores[0] == stores[1] == stores[2]
    source = write_checkpoint(tmp_path / "bf16", config, random_weights(config), dtype="BF16")
    texts = {"chat_template": "{{ messages[0].content }}!", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (source / "tokenizer_config.json").write_text(json.dumps(texts))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 0]}))
    convert_checkpoint(source, tmp_path / "bf16_store")
    with open_store(tmp_path / "bf16_store") as reader:
        assert reader.chat_template() == "{{ messages[0].content }}!" and reader.spec.eos_tokens == (0, 3)
        assert reader.manifest.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
        expected = (random_weights(config)["model.norm.weight"].view(np.uint32) & 0xFFFF0000).view(np.float32)
        assert np.array_equal(reader.array("final_norm"), expected)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None, "model_type": None}, "architecture"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"head_dim": 24}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
    ],
)
def test_unsupported_configs_are_named(tmp_path, changes, message):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    (source / "config.json").write_text(json.dumps(tiny_config(**changes)))
    with pytest.raises(ConvertError, match=message):
        convert_checkpoint(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def broken(tmp_path: Path, change) -> ElmoeError:
    source = write_checkpoint(tmp_path / "source", tiny_config(), shards=2)
    change(source)
    with pytest.raises(ElmoeError) as error:
        convert_checkpoint(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    return error.value


def test_spellings_that_mean_the_same():
    """Nulls, transformers 5's names, and defaults written out."""
    plain = tiny_config(rope_theta=5000.0)
    renamed = tiny_config(
        num_local_experts=6, head_dim=None, rope_scaling={"rope_type": "default"}, hidden_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, mlp_only_layers=None,
    )  # fmt: skip
    del renamed["num_experts"], renamed["rope_theta"]
    assert spec_of_config(renamed) == spec_of_config(plain | {"hidden_size": 64})


def test_incomplete_and_damaged_checkpoints_are_named(tmp_path):
    first = "model-00001-of-00002.safetensors"

    def edit(source: Path, **changes: object) -> None:
        path = source / first
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header["model.embed_tokens.weight"] |= changes
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    cases = {
        "00001-of-00002": lambda source: (source / first).unlink(),
        "tokenizer.json": lambda source: (source / "tokenizer.json").unlink(),
        "config.json' is missing": lambda source: (source / "config.json").unlink(),
        "config.json' is not JSON": lambda source: (source / "config.json").write_text("{"),
        "config.json' is nested deeper": lambda source: (source / "config.json").write_text("[" * 100_000),
        "config.json' holds no JSON object": lambda source: (source / "config.json").write_text("[]"),
        "00001.*damaged header": lambda source: (source / first).write_bytes(
            (100_000).to_bytes(8, "little") + b"[" * 100_000
        ),
        r"embed_tokens.*overlap": lambda source: edit(source, data_offsets=[4, 4 + 300 * 48 * 4]),
        "outside its file": lambda source: os.truncate(source / first, (source / first).stat().st_size - 10),
        "no safetensors": lambda source: (source / first).write_bytes(b"\xff" * 100),
        "damaged header": lambda source: (source / first).write_bytes((5).to_bytes(8, "little") + b"{,,,}" * 2),
        "outside the folder": lambda source: (source / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": "../secret"}})
        ),
        "no weight_map": lambda source: (source / "model.safetensors.index.json").write_text("{}"),
        "dtype I64": lambda source: edit(source, dtype="I64"),
        r"embed_tokens.*damaged shape": lambda source: edit(source, shape=[-300, 48]),
        r"embed_tokens.* damaged shape": lambda source: edit(source, data_offsets=[0, 4, 8]),
        r"embed_tokens.* damaged shape ": lambda source: edit(source, dtype=["F32"]),
        r"embed_tokens.* damaged shape or": lambda source: edit(source, shape=10**30),
        r"embed_tokens.*a damaged shape": lambda source: edit(source, shape=[1] * 7 + [300, 48]),
        "'tokenizer.json' is not": lambda source: cut(source / "tokenizer.json"),
        "tokenizer.json' is a Git LFS pointer": lambda source: (source / "tokenizer.json").write_text(LFS_POINTER),
        "no safetensors file": lambda source: (source / first).write_text(LFS_POINTER),
        "chat template": lambda source: (source / "chat_template.jinja").write_text("{% for %}"),
        "tokenizer_config.json": lambda source: (source / "tokenizer_config.json").write_text("[" * 100_000),
        "generation_config.json": lambda source: (source / "generation_config.json").write_text("[]"),
        r"embed_tokens.*lies outside": lambda source: edit(source, data_offsets=[2**60, 2**60 + 57600]),
    }
    for index, (message, change) in enumerate(cases.items()):
        error = broken(tmp_path / str(index), change)
        assert isinstance(error, ConvertError), message
        assert re.search(message, str(error)), (message, str(error))


def test_a_missing_tensor_is_named(tmp_path):
    weights = random_weights(tiny_config())
    del weights["model.layers.1.mlp.experts.4.up_proj.weight"]
    source = write_checkpoint(tmp_path / "source", tiny_config(), weights)
    with pytest.raises(ConvertError, match=r"layers\.1\.mlp\.experts\.4\.up_proj"):
        convert_checkpoint(source, tmp_path / "store")


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.experts.3.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_nan_weights_name_the_tensor(tmp_path, name):
    weights = random_weights(tiny_config())
    weights[name].reshape(-1)[5] = np.nan
    source = write_checkpoint(tmp_path / "source", tiny_config(), weights)
    with pytest.raises(NumericsError, match=name):
        convert_checkpoint(source, tmp_path / "store")
    assert not list(tmp_path.glob("store*"))  # nor a part, from which nothing could go on


def test_an_existing_target_and_a_full_disk(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    (tmp_path / "store").mkdir()
    with pytest.raises(ConvertError, match="exists already"):
        convert_checkpoint(source, tmp_path / "store")
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConvertError, match=" more of disk, 1000 B are free"):
        convert_checkpoint(source, tmp_path / "other")


def test_a_write_that_fails_midway_can_be_resumed(tmp_path, monkeypatch):
    """ENOSPC while a layer is written: a clear error, no store, and the next run finishes with equal bytes."""
    source = write_checkpoint(tmp_path / "source", tiny_config())
    convert_checkpoint(source, tmp_path / "whole")
    limit = (tmp_path / "whole" / "dense.bin").stat().st_size + 30_000

    def convert() -> subprocess.CompletedProcess[str]:
        code = f"""
            import resource, signal
            from elmoe.convert import convert_checkpoint
            from elmoe.errors import ConvertError
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit // 2}, {limit // 2}))
            try:
                convert_checkpoint({str(source)!r}, {str(tmp_path / "store")!r})
            except ConvertError as error:
                print(error)
        """
        return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)

    assert "cannot write" in convert().stdout
    assert not (tmp_path / "store").exists()
    convert_checkpoint(source, tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_a_killed_conversion_leaves_no_store_and_resumes(tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    convert_checkpoint(source, tmp_path / "whole")
    code = f"""
        import os, signal
        from elmoe.convert import convert_checkpoint
        def progress(done, total):
            if done > total - 4:
                os.kill(os.getpid(), signal.SIGKILL)
        convert_checkpoint({str(source)!r}, {str(tmp_path / "store")!r}, progress)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert run.returncode == -signal.SIGKILL
    partial = tmp_path / "store.partial"
    assert partial.exists() and not (tmp_path / "store").exists()
    kept = partial / "layer-000.experts"
    stamp = kept.stat().st_mtime_ns
    with open(partial / "journal.jsonl", "ab") as journal:
        journal.write(b'{"file": {"na')  # as if killed while writing a line
    seen = []
    convert_checkpoint(source, tmp_path / "store", lambda done, total: seen.append((done, total)))
    assert content(tmp_path / "store") == content(tmp_path / "whole") and not partial.exists()
    assert (tmp_path / "store" / kept.name).stat().st_mtime_ns == stamp, "the finished layer was written again"
    assert seen[-1][0] == seen[-1][1]


def test_another_source_starts_anew(tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    partial = tmp_path / "store.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"fingerprint":"another"}\n{"file":{"name":"dense.bin","bytes":4096}}\n')
    convert_checkpoint(source, tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        reader.verify()


def test_memory_stays_bounded(tmp_path):
    """A large embedding is quantised in row blocks: peak memory below twice the largest tensor plus 200 MB."""
    config = tiny_config(vocab_size=400_000, hidden_size=128, num_hidden_layers=1)
    weights = random_weights(config | {"vocab_size": 300})
    weights["model.embed_tokens.weight"] = np.zeros((400_000, 128), np.float32)  # 205 MB
    source = write_checkpoint(tmp_path / "source", config, weights)
    code = f"""
        import resource
        from elmoe.convert import convert_checkpoint
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        convert_checkpoint({str(source)!r}, {str(tmp_path / "store")!r})
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 2 * 205e6 + 200e6
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


def test_float64_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    write_safetensors(source / "model.safetensors", random_weights(tiny_config()), "F64")
    with pytest.raises(ConvertError, match="dtype F64"):
        convert_checkpoint(source, tmp_path / "store")


def test_special_tokens_of_the_checkpoint_reach_its_chat_template(tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ bos_token }}x{{ eos_token }}"}
        )
    )
    convert_checkpoint(source, tmp_path / "store")
    with load(tmp_path / "store", reader="memory") as model:
        assert model.chat_prompt([{"role": "user", "content": "x"}]) == "<s>x</s>"


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_source_file_that_shrinks_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(range(256)) * 100)
    file = SourceFile(tmp_path / name, "download it")
    assert file.read(256, 3).tolist() == [0, 1, 2]
    os.truncate(tmp_path / name, 1000)
    with pytest.raises(ConvertError, match=f"'{name}' ends at byte 1000, it had 25600"):
        file.read(0, 25600)


@pytest.mark.parametrize("shards,dtype", [(1, "F32"), (3, "F32"), (1, "BF16")])
def test_stacked_experts_are_the_experts(tmp_path, shards, dtype):
    """Experts of a layer in one tensor, as transformers 5 saves them; a dense layer stays as it is."""
    config = tiny_config(mlp_only_layers=[1])
    weights = random_weights(config)
    convert_checkpoint(write_checkpoint(tmp_path / "plain", config, weights, shards, dtype), tmp_path / "expected")
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([weights.pop(f"{prefix}{expert}.{name}_proj.weight") for expert in range(config["num_experts"])])
            for name in PROJECTIONS
        )
        weights |= {prefix + "gate_up_proj": np.concatenate([gate, up], axis=1), prefix + "down_proj": down}
    source = write_checkpoint(tmp_path / "stacked", config, weights, shards, dtype)
    convert_checkpoint(source, tmp_path / "store")
    expected = content(tmp_path / "expected")
    assert {name for name, data in content(tmp_path / "store").items() if data != expected[name]} == {"manifest.json"}
    del weights["model.layers.2.mlp.experts.down_proj"]
    with pytest.raises(ConvertError, match=r"'model\.layers\.2\.mlp\.experts\.down_proj' is missing"):
        convert_checkpoint(write_checkpoint(tmp_path / "lacking", config, weights), tmp_path / "other")


NAN = float("nan")


@pytest.mark.parametrize(
    "eos", ["<|im_end|>", "5", 5.0, True, [5, None], ["5"], [[5]], {"id": 5}, -1, 300, NAN, [5, 10**30]]
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_that_are_no_token_ids_are_refused(tmp_path, file, eos):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    config = json.loads((source / "config.json").read_text()) if file == "config.json" else {}
    (source / file).write_text(json.dumps(config | {"eos_token_id": eos}))
    with pytest.raises(ConvertError, match=rf"^{file}: 'eos_token_id' is "):
        convert_checkpoint(source, tmp_path / "store")


@pytest.mark.parametrize(
    "config,generation,ends",
    [
        (5, ..., (5,)),
        ([5, 7], ..., (5, 7)),
        (None, ..., ()),
        (5, None, (5,)),
        (None, None, ()),
        (None, [7, 5], (7, 5)),
        (5, [7, 5], (5, 7)),
        ([5, 7], 7, (7,)),
        (5, 9, (9,)),
        ([5, 5], [], ()),
    ],
)
def test_the_generation_config_says_what_ends(tmp_path, config, generation, ends):
    """It counts in place of config.json where it names ends, as in transformers; null means that it does not."""
    source = write_checkpoint(tmp_path / "source", tiny_config(eos_token_id=config))
    if generation is not ...:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    convert_checkpoint(source, tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        assert reader.spec.eos_tokens == ends


@pytest.mark.parametrize(
    "key",
    ["attention_bias", "use_sliding_window", "hidden_act", "norm_topk_prob", "rms_norm_eps", "max_position_embeddings",
     "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "mlp_only_layers", "decoder_sparse_step", "head_dim",
     "partial_rotary_factor", "quantization_config", "tie_word_embeddings"],
)  # fmt: skip
def test_null_means_the_default(key):
    config = tiny_config(hidden_size=64)
    config.pop(key, None)
    assert spec_of_config(config | {key: None}) == spec_of_config(config)


def test_a_tensor_that_is_quantised_in_pieces_is_the_same(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source", tiny_config(moe_intermediate_size=40))
    convert_checkpoint(tmp_path / "source", tmp_path / "whole")
    for pieces in (1, 3 * 64 * 16):  # pieces of the fewest rows, and of a few blocks of them
        monkeypatch.setattr(source_module, "PIECE", pieces)
        convert_checkpoint(tmp_path / "source", tmp_path / str(pieces))
        assert content(tmp_path / str(pieces)) == content(tmp_path / "whole")
