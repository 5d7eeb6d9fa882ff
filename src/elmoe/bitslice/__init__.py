"""The definition of elmoe's numbers in plain NumPy: the native kernels must equal it bit for bit.

Knows nothing of files, policies or time. Imports NumPy, the error tree and the data of formats only.
"""

from elmoe.bitslice.attention import AttentionWeights, KVCache, Places, attention_block, rms_norm
from elmoe.bitslice.backend import (
    Backend,
    DenseWeights,
    Draft,
    ExpertFeed,
    LayerStack,
    LayerWeights,
    Report,
    Routed,
    Routings,
    SharedWeights,
    forward,
)
from elmoe.bitslice.expert import ExpertLayout
from elmoe.bitslice.formats import (
    Matrix,
    PackedMatrix,
    QuantizedMatrix,
    StackedMatrix,
    format_of,
    from_sections,
    matmul,
    quantized,
    sections_of,
)
from elmoe.bitslice.history import History
from elmoe.bitslice.latent import LatentWeights, latent_block
from elmoe.bitslice.matmul import nested_matmul, quantize_activations
from elmoe.bitslice.moe import ExpertTerms, RouterWeights, Routing, embed, expert_ffn, logits, route, shared_weights
from elmoe.bitslice.nested import NestedMatrix, quantize
from elmoe.bitslice.rotary import rotary_tables
from elmoe.bitslice.sampling import Sample, SamplingParameters, sample

__all__ = [
    "AttentionWeights",
    "Backend",
    "DenseWeights",
    "Draft",
    "ExpertFeed",
    "ExpertLayout",
    "ExpertTerms",
    "History",
    "KVCache",
    "LatentWeights",
    "LayerStack",
    "LayerWeights",
    "Matrix",
    "NestedMatrix",
    "PackedMatrix",
    "Places",
    "QuantizedMatrix",
    "Report",
    "Routed",
    "RouterWeights",
    "Routing",
    "Routings",
    "Sample",
    "SamplingParameters",
    "SharedWeights",
    "StackedMatrix",
    "attention_block",
    "embed",
    "expert_ffn",
    "format_of",
    "forward",
    "from_sections",
    "latent_block",
    "logits",
    "matmul",
    "nested_matmul",
    "quantize",
    "quantize_activations",
    "quantized",
    "rms_norm",
    "rotary_tables",
    "route",
    "sample",
    "sections_of",
    "shared_weights",
]
