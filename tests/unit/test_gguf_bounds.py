"""GGUF files whose tensors cannot be those of a model are refused by what is wrong with them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType as TensorType

from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_file import GgufFile
from elmoe.errors import ConvertError
from tests.gguf_files import random_parts, write_gguf


@pytest.mark.parametrize("shape", [(64,), (300, 2, 32)])
def test_an_embedding_of_other_dimensions_is_refused_as_such(tmp_path, shape):
    parts = random_parts(TensorType.F32)
    parts["token_embd.weight"] = (TensorType.F32, np.zeros(shape, np.float32))
    file = write_gguf(tmp_path / "a.gguf", parts)
    with pytest.raises(ConvertError, match=r"'token_embd\.weight' has shape .*, not that of an embedding"):
        convert_checkpoint(file, tmp_path / "store")


@pytest.mark.parametrize(("dimensions", "sound"), [(0, False), (1, True), (4, True), (5, False)])
def test_a_tensor_has_one_to_four_dimensions(tmp_path, dimensions, sound):
    """GGML_MAX_DIMS of ggml.h is 4."""
    tensor = (
        struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{dimensions}QIQ", dimensions, *[1] * dimensions, TensorType.F32, 0)
    )
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(256))
    if sound:
        assert GgufFile(tmp_path / "a.gguf").tensor("t").shape == (1,) * dimensions
    else:
        with pytest.raises(ConvertError, match=f"'t' in 'a.gguf' has {dimensions} dimensions"):
            GgufFile(tmp_path / "a.gguf")
