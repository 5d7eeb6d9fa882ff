"""`elmoe inspect` against sizes that are summed here by hand, from the numbers of a config.json.

A weight of 8 bits comes with an fp16 scale for 32: 17/16 bytes, 9/16 of them for drafts; one of MXFP4 with a byte for 32.
Whatever begins in a file, begins on a page.
"""

from __future__ import annotations

import json
from math import ceil

import pytest
from click.testing import CliRunner

from elmoe.cli.main import cli
from tests.family_configs import CONFIGS

PAGE, VOCABULARY, HIDDEN, HEADS, WIDTH, EXPERTS = 4096, 320, 128, 4, 64, 8
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=3, tie_word_embeddings=False,
    max_position_embeddings=512,
)  # fmt: skip


def pages(size: float) -> int:
    return ceil(size / PAGE) * PAGE


def matrix(*shapes: tuple[int, int]) -> int:
    return pages(sum(rows * columns for rows, columns in shapes) * 17 / 16)


def floats(*counts: int) -> int:
    return pages(4 * sum(counts))


def gated(width: int) -> tuple[int, int]:
    """Upper and lower slice of a feed-forward of three matrices."""
    return pages(3 * width * HIDDEN * 9 / 16), pages(3 * width * HIDDEN / 2)


def ends() -> int:
    """First page, embedding, head and the norm between."""
    return PAGE + 2 * matrix((VOCABULARY, HIDDEN)) + floats(HIDDEN)


def qwen3_moe() -> dict[str, int]:
    head, kv_heads = 32, 2
    attention = matrix((HEADS * head, HIDDEN), (2 * kv_heads * head, HIDDEN)) + matrix((HIDDEN, HEADS * head))
    layer = attention + 2 * floats(head) + 2 * floats(HIDDEN) + floats(EXPERTS * HIDDEN)
    msb, lsb = gated(WIDTH)
    return dict(
        experts=3 * EXPERTS, msb_bytes=3 * EXPERTS * msb, lsb_bytes=3 * EXPERTS * lsb, dense_bytes=ends() + 3 * layer,
        kv_bytes_per_position=3 * 2 * kv_heads * head * 2,
    )  # fmt: skip


def gpt_oss() -> dict[str, int]:
    """Biases of queries, keys and values are one tensor; experts have biases and one slice."""
    head, kv_heads = 32, 2
    attention = matrix((HEADS * head, HIDDEN), (2 * kv_heads * head, HIDDEN)) + matrix((HIDDEN, HEADS * head))
    biases = floats((HEADS + 2 * kv_heads) * head) + floats(HIDDEN) + floats(HEADS)
    router = floats(EXPERTS * HIDDEN) + floats(EXPERTS)
    experts = 2 * floats(EXPERTS * WIDTH) + floats(EXPERTS * HIDDEN)
    layer = attention + biases + router + experts + 2 * floats(HIDDEN)
    return dict(
        experts=3 * EXPERTS, msb_bytes=3 * EXPERTS * pages(3 * WIDTH * HIDDEN * 17 / 32), lsb_bytes=0,
        dense_bytes=ends() + 3 * layer, kv_bytes_per_position=3 * 2 * kv_heads * head * 2,
    )  # fmt: skip


def deepseek_v2() -> dict[str, int]:
    """The first layer is dense; the others have two shared experts, as one of twice the width."""
    rank, rotary, plain, value, dense = 64, 32, 32, 32, 192
    attention = (
        matrix((HEADS * (plain + rotary), HIDDEN), (rank + rotary, HIDDEN)) + floats(rank)
        + matrix((HEADS * rank, plain)) + matrix((HEADS * value, rank)) + matrix((HIDDEN, HEADS * value))
    )  # fmt: skip
    layer = attention + 2 * floats(HIDDEN)
    msb, lsb = gated(WIDTH)
    return dict(
        experts=2 * EXPERTS, msb_bytes=2 * EXPERTS * msb, lsb_bytes=2 * EXPERTS * lsb,
        dense_bytes=ends() + 3 * layer + 2 * (floats(EXPERTS * HIDDEN) + sum(gated(2 * WIDTH))) + sum(gated(dense)),
        kv_bytes_per_position=3 * (rank + rotary) * 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "by_hand"),
    [
        ("olmoe", dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", intermediate_size=WIDTH, head_dim=32,
                       num_key_value_heads=2, moe_intermediate_size=WIDTH, num_experts=EXPERTS, decoder_sparse_step=1,
                       mlp_only_layers=[]), qwen3_moe),
        ("gpt_oss", dict(intermediate_size=WIDTH, head_dim=32, num_key_value_heads=2, num_local_experts=EXPERTS,
                         attention_bias=True,
                         layer_types=["sliding_attention", "full_attention", "sliding_attention"]), gpt_oss),
        ("deepseek_v2", dict(intermediate_size=192, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, kv_lora_rank=64,
                             qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32), deepseek_v2),
    ],
)  # fmt: skip
def test_sizes_are_the_sums_by_hand(tmp_path, name, changes, by_hand):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | SHAPE | changes))
    for words in (("synth", str(tmp_path / "config.json"), str(tmp_path / "store")), ("inspect", str(tmp_path / "store"))):
        done = CliRunner().invoke(cli, [*words, *(["--json"] if words[0] == "inspect" else [])])
        assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {field: told[field] for field in by_hand()} == by_hand()
