"""Measuring: throughput of modes, acceptance, perplexity, this machine's bandwidths and costs, runs driven by a trace.

Everything here runs an engine and reports numbers. The engine knows nothing of it.
"""
