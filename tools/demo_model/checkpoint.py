"""A store of the demo model's family as a Hugging Face folder of dequantised weights, to train on from. usage:
checkpoint.py STORE FOLDER

Run in the repository's root with the environment of its tests and `PYTHONPATH=.`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.checkpoints import write_safetensors
from tests.parity.harness import dequantized_tensors

from elmoe.models.spec import GroupedAttention, Moe
from elmoe.store import open_store


def main() -> None:
    store, folder = map(Path, sys.argv[1:])
    with open_store(store) as reader:
        folder.mkdir()
        spec = reader.spec
        attention, experts = spec.layers[0].attention, spec.layers[0].feed_forward
        assert isinstance(attention, GroupedAttention) and isinstance(experts, Moe)
        config = dict(
            vocab_size=spec.vocabulary, hidden_size=spec.hidden, num_hidden_layers=len(spec.layers),
            num_experts=experts.router.experts, num_experts_per_tok=experts.router.top_k,
            moe_intermediate_size=experts.width,
            num_attention_heads=attention.heads, num_key_value_heads=attention.kv_heads, head_dim=attention.head_dim,
            rope_theta=attention.rope.theta,
        )  # fmt: skip
        write_safetensors(folder / "model.safetensors", dequantized_tensors(reader))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copyfile(store / "tokenizer.json", folder / "tokenizer.json")


if __name__ == "__main__":
    main()
