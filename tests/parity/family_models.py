"""Random models of transformers for the configurations of ``tests/family_configs.py``. Imports torch."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from elmoe.models import spec_of_config
from tests.family_configs import CONFIGS
from tests.parity import harness
from tests.parity.tiny_checkpoints import write_folder, write_tokenizer


def make(name: str) -> Any:
    """A random model whose attention is peaked, whose norms are not all one and whose biases are not zero."""
    values = deepcopy(CONFIGS[name])  # transformers writes into what it is given: a theta into a shared scaling, say
    kind = values.pop("model_type")
    del values["architectures"]
    torch.manual_seed(sum(map(ord, name)))
    config = transformers.CONFIG_MAPPING[kind](**values, initializer_range=0.12, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            last = parameter_name.rpartition(".")[2]
            if parameter_name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "bias" in last or last == "sinks":  # a correction bias is a buffer
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif ".gate.weight" in parameter_name or ".router.weight" in parameter_name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif ".experts." in parameter_name:
                parameter.copy_(0.12 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def convert_saved(name: str, folder: Path) -> tuple[Any, Any]:
    """A store of a random model that transformers saved, and transformers' model of the store's weights in float64."""
    make(name).save_pretrained(folder / "saved")
    write_tokenizer(folder / "saved")
    reader = harness.convert(folder / "saved", folder / "store")
    assert reader.spec == spec_of_config(CONFIGS[name])
    config = json.loads((folder / "saved" / "config.json").read_text()) | {"dtype": "float32"}
    write_folder(folder / "dequantized", config, harness.dequantized_tensors(reader), "float32")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "dequantized", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, problems
    return reader, model.eval()


def token_ids(count: int = 150) -> np.ndarray:
    """Tokens of a comparison: they cross pages, and windows where there are any."""
    return np.random.default_rng(1).integers(1, 300, count).astype(np.int32)
