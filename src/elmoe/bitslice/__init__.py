"""The definition of elmoe's numbers in plain NumPy: the native kernels must equal it bit for bit.

Knows nothing of files, models, policies or time. Imports NumPy and the error tree only.
"""

from elmoe.bitslice.arithmetic import rotary_tables
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
    forward,
)
from elmoe.bitslice.expert import ExpertLayout
from elmoe.bitslice.matmul import nested_matmul, quantize_activations
from elmoe.bitslice.moe import RouterWeights, Routing, embed, expert_ffn, logits, route
from elmoe.bitslice.nested import NestedMatrix, quantize
from elmoe.bitslice.sampling import Sample, SamplingParameters, sample

__all__ = [
    "AttentionWeights",
    "Backend",
    "DenseWeights",
    "Draft",
    "ExpertFeed",
    "ExpertLayout",
    "KVCache",
    "LayerStack",
    "LayerWeights",
    "NestedMatrix",
    "Places",
    "Report",
    "Routed",
    "RouterWeights",
    "Routing",
    "Routings",
    "Sample",
    "SamplingParameters",
    "attention_block",
    "embed",
    "expert_ffn",
    "forward",
    "logits",
    "nested_matmul",
    "quantize",
    "quantize_activations",
    "rms_norm",
    "rotary_tables",
    "route",
    "sample",
]
