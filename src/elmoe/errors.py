"""Every error elmoe raises on purpose.

::

    ElmoeError
    ├── NumericsError     a weight or an activation is NaN or infinite, or a scale overflows
    ├── KernelError       native kernels are missing, or a requested variant cannot run here
    ├── StoreError        a store (or a file in it) is damaged, from the future, or not a store
    ├── ModelError        a model's description contradicts itself, or asks for what is not supported
    ├── ConvertError      a checkpoint cannot be converted (unsupported, incomplete, no room)
    ├── BudgetError       the fast-memory budget cannot hold what must be resident
    ├── RequestError      a generation request is malformed (empty prompt, too long, bad sampling)
    ├── HardwareError     a hardware description has an unknown key, a missing unit, an impossible value
    ├── TraceError        a trace file is damaged or belongs to another model
    └── MissingExtraError an optional dependency is not installed

Each takes a message and an optional ``hint`` that tells how to mend it; the command line prints both, and so
does a traceback.
"""


class ElmoeError(Exception):
    """Base of all errors raised on purpose; ``hint`` says how to mend it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint is not None:
            self.add_note(f"hint: {hint}")


class NumericsError(ElmoeError):
    """A non-finite weight or activation, or an overflowing scale."""


class KernelError(ElmoeError):
    """Native kernels missing, or a variant this processor cannot run."""


class StoreError(ElmoeError):
    """A damaged, truncated, foreign or too new store."""


class ModelError(ElmoeError):
    """A description of a model that contradicts itself, or that is not supported."""


class ConvertError(ElmoeError):
    """A checkpoint that cannot be converted."""


class BudgetError(ElmoeError):
    """A fast-memory budget below the minimum."""


class RequestError(ElmoeError):
    """A malformed generation request."""


class TraceError(ElmoeError):
    """A damaged trace, or one of another model."""


class HardwareError(ElmoeError):
    """A hardware description with an unknown key, a missing unit or an impossible value."""


class MissingExtraError(ElmoeError):
    """An optional dependency that is not installed; the hint names the extra of the package that brings it.

    ``module``: the dependency; ``what``: that which needs it.
    """

    def __init__(self, what: str, module: str, hint: str) -> None:
        super().__init__(f"{what} needs '{module}', which is not installed", hint)
        self.what, self.module = what, module
