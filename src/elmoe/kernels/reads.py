"""Asynchronous reads into caller-owned memory: the native pool behind the ``direct`` reader's slow tier."""

from elmoe._native import ReadPool  # noqa: TID251 - this package is the door

__all__ = ["ReadPool"]
