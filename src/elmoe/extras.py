"""Optional dependencies: which extra of the package brings a module that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from elmoe.errors import MissingExtraError

EXTRAS = {
    "sim": ("plotly", "pyarrow", "yaml"),
    "chat": ("prompt_toolkit",),
    "server": ("fastapi", "httptools", "llguidance", "prometheus_client", "pydantic", "uvicorn"),
}
"""Extra -> the modules it brings."""


def missing(extra: str) -> str | None:
    """A module of an extra that is not installed; None if all are."""
    return next((module for module in EXTRAS[extra] if find_spec(module) is None), None)


def missing_extra(module: str, what: str) -> MissingExtraError | None:
    """The error for a module that is not installed; None if no extra brings it."""
    for extra, modules in EXTRAS.items():
        if module in modules:
            return MissingExtraError(
                what, module,
                f"install the extra '{extra}': pip install 'elmoe[{extra}]', or in a checkout pip install '.[{extra}]'",
            )  # fmt: skip
    return None


@contextmanager
def naming_extra(what: str) -> Iterator[None]:
    """Turns the failed import of an optional module into a MissingExtraError that names the extra.

    :param what: the subject of the message, such as ``elmoe simulate``; it replaces a package such as ``elmoe.trace``.
    :raises MissingExtraError: in place of the ModuleNotFoundError of a module that an extra brings.
    """
    try:
        yield
    except MissingExtraError as error:
        found = missing_extra(error.module, what) if error.what.startswith("elmoe.") else None
        raise (found or error) from error.__cause__
    except ModuleNotFoundError as error:
        found = missing_extra((error.name or "").split(".")[0], what)
        if found is None:
            raise
        raise found from error
