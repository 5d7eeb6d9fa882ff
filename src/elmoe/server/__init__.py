"""The HTTP server: OpenAI's wire format over the engine's step. One process, one model.

It knows HTTP, requests and answers; it computes nothing. One thread steps the engine (``engine_thread``), everything else
runs in one loop of asyncio.
"""
