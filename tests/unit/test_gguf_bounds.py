"""GGUF files whose tensors cannot be those of a model are refused by what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as TensorType

from elmoe.convert import convert_checkpoint
from elmoe.errors import ConvertError
from tests.gguf_files import random_parts, write_gguf


@pytest.mark.parametrize("shape", [(64,), (300, 2, 32)])
def test_an_embedding_of_other_dimensions_is_refused_as_such(tmp_path, shape):
    parts = random_parts(TensorType.F32)
    parts["token_embd.weight"] = (TensorType.F32, np.zeros(shape, np.float32))
    file = write_gguf(tmp_path / "a.gguf", parts)
    with pytest.raises(ConvertError, match=r"'token_embd\.weight' has shape .*, not that of an embedding"):
        convert_checkpoint(file, tmp_path / "store")
