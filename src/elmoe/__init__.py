"""elmoe: elastic self-speculative decoding of Mixture-of-Experts models over two memory tiers.

::

    import elmoe

    with elmoe.load("demo") as model:
        print(model.generate("The whale", max_tokens=64).text)

The names below load what they need at their first use; their types are in ``__init__.pyi``.
"""

__version__ = "0.1.0"
__all__ = ["ElmoeError", "EngineOptions", "Generation", "Model", "Piece", "SamplingParams", "load"]

_HOMES = {
    "ElmoeError": "elmoe.errors", "EngineOptions": "elmoe.engine.options", "Generation": "elmoe.generation",
    "Model": "elmoe.llm", "Piece": "elmoe.generation", "SamplingParams": "elmoe.generation", "load": "elmoe.llm",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'elmoe' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
