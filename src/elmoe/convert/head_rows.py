"""The order of a head's rows: GGUF's ``llama`` lays the two rows of a rotated pair side by side, checkpoints and stores lay
them half a head apart. Rows move as they are, so nothing is quantised anew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rows_of_neighbours(rows: NDArray[np.int64], head_dim: int) -> NDArray[np.int64]:
    """Where these rows of halves lie among neighbours."""
    within, half = rows % head_dim, head_dim // 2
    return rows - within + 2 * (within % half) + within // half


def rows_of_halves(rows: NDArray[np.int64], head_dim: int) -> NDArray[np.int64]:
    """Where these rows of neighbours lie among halves."""
    within, half = rows % head_dim, head_dim // 2
    return rows - within + within % 2 * half + within // 2
