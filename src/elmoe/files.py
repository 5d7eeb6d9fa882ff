"""Files that appear when they are whole."""

from __future__ import annotations

import os
from pathlib import Path

from elmoe.errors import HardwareError


def write_whole(path: Path, content: bytes) -> None:
    """Write under another name, then rename; HardwareError if that fails, and nothing half-written stays."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise HardwareError(f"cannot write '{path}': {error.strerror or error}", "choose another --out") from error
    finally:
        partial.unlink(missing_ok=True)
