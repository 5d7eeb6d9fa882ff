"""Dense families against transformers: tiny random Llama and Qwen3 models, saved by transformers, as folder and as GGUF.

Needs the parity extra. Run with ``make parity``; the errors are printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from elmoe import bitslice  # noqa: E402
from elmoe.convert.gguf_export import export_store  # noqa: E402
from tests.parity import float_backend, harness  # noqa: E402
from tests.parity.bounds import FLOAT_BOUND  # noqa: E402
from tests.parity.tiny_checkpoints import write_folder, write_tokenizer  # noqa: E402
from tests.parity.transformers_reference import greedy, logits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch and transformers warn of their own affairs

GENERATED = 64
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("Llama", dict(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)),
    "llama_untied_bf16": ("Llama", dict(
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, tie_word_embeddings=False, dtype="bfloat16",
        rms_norm_eps=1e-2)),
    "llama_odd_widths": ("Llama", dict(
        hidden_size=80, intermediate_size=136, num_attention_heads=5, num_key_value_heads=1, head_dim=48,
        rope_theta=5e5, tie_word_embeddings=True)),
    "qwen3_tied": ("Qwen3", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)),
    "qwen3_untied_bf16": ("Qwen3", dict(
        num_attention_heads=3, num_key_value_heads=3, head_dim=64, tie_word_embeddings=False, dtype="bfloat16")),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    reader: Any
    model: Any
    folder: Path
    ids: np.ndarray
    logits: np.ndarray


def make(kind: str, changes: dict[str, Any]) -> Any:
    """A random model whose attention is peaked and whose norms are not all one."""
    values = dict(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.12,
    )  # fmt: skip
    dtype = changes.pop("dtype", "float32")
    torch.manual_seed(len(str(changes)))
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    kind, changes = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(kind, dict(changes)).save_pretrained(folder / "saved")
    write_tokenizer(folder / "saved")
    reader = harness.convert(folder / "saved", folder / "store")
    config = json.loads((folder / "saved" / "config.json").read_text()) | {"dtype": "float32"}
    write_folder(folder / "dequantized", config, harness.dequantized_tensors(reader), "float32")
    auto, name = transformers.AutoModelForCausalLM, folder / "dequantized"
    model = auto.from_pretrained(name, dtype=torch.float64, attn_implementation="eager").eval()
    ids = np.random.default_rng(1).integers(0, 300, 150).astype(np.int32)
    yield Case(request.param, reader, model, folder, ids, logits(model, ids))
    reader.close()


def test_float_backend_equals_transformers(case: Case) -> None:
    for chunk in (1, 32, len(case.ids)):
        error = harness.relative_error(harness.decoder_logits(case.reader, float_backend, case.ids, chunk), case.logits)
        print(f"\n{case.name}: float, {chunk} tokens at a time: max relative error {error:.1e}", end="")
        assert error < FLOAT_BOUND


def test_native_kernels_equal_bitslice(case: Case) -> None:
    kernels = harness.native_kernels()
    if kernels is None:
        pytest.skip("no native kernels")
    expected = harness.decoder_logits(case.reader, bitslice, case.ids)
    print(f"\n{case.name}: W8A8, rms error {harness.rms_error(expected, case.logits):.3f}", end="")
    assert harness.rms_error(expected, case.logits) < 0.1
    used = kernels.variant()
    for variant in kernels.variants():
        kernels.set_variant(variant)
        try:
            for chunk in (1, 7, len(case.ids)):
                assert np.array_equal(harness.decoder_logits(case.reader, kernels, case.ids, chunk), expected)
        finally:
            kernels.set_variant(used)


def test_greedy_generation(case: Case) -> None:
    prompts = [case.ids[:12], case.ids[20:21], case.ids[30:100]]
    expected = [greedy(case.model, prompt, GENERATED) for prompt in prompts]
    for options in ({"mode": "plain"}, {"mode": "elastic", "batch": 3}, {"prefill_chunk": 5}):
        results, _ = harness.greedy(case.reader, float_backend, prompts, GENERATED, **options)
        assert [result.tokens for result in results] == expected, options


def test_a_gguf_twin_gives_the_same_tokens(case: Case, tmp_path: Path) -> None:
    if case.reader.spec.hidden % 32 or case.reader.spec.layers[0].feed_forward.width % 32:
        pytest.skip("Q8_0 has groups of 32")
    export_store(case.reader, tmp_path / "model.gguf")
    with harness.convert(tmp_path / "model.gguf", tmp_path / "store") as twin:
        found = harness.greedy(twin, float_backend, [case.ids[:12]], GENERATED)[0]
    assert found[0].tokens == greedy(case.model, case.ids[:12], GENERATED)
