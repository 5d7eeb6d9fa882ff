"""transformers' Qwen3-MoE as the reference: eager attention, eager experts. Imports torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3MoeForCausalLM


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Qwen3MoeForCausalLM:
    """A checkpoint folder in the given precision; every weight must be found, and no other."""
    model, info = Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def logits(model: Qwen3MoeForCausalLM, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """Logits (tokens, vocabulary) of one sequence."""
    with torch.inference_mode():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double().numpy()


def greedy(model: Qwen3MoeForCausalLM, prompt: NDArray[np.int32], count: int) -> tuple[int, ...]:
    """``generate`` without sampling and without an end of text: the new token ids."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count
        )
    return tuple(output[0, len(prompt) :].tolist())
