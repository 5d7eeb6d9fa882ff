"""Serving: the draft -> verify -> commit loop over sequences, their KV cache, the expert tier and the sampler.

Knows nothing of how a file lies on disk (``store``), what a family computes (``models``) or how a decision is made
(``policy``); it carries plans out and records facts.
"""
