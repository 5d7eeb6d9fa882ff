"""elmoe: elastic self-speculative decoding of Mixture-of-Experts models over two memory tiers."""

__version__ = "0.1.0"
