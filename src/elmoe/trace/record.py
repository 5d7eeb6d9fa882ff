"""Writing a trace while a run goes on: rows are buffered, written in row groups, and the file appears when it is whole."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.files import PartialFile
from elmoe.models.spec import ModelSpec
from elmoe.trace.format import TRACE_VERSION, TracedModel, TraceHeader, table_schema

ROWS_PER_GROUP = 4096


class TraceRecorder:
    """A context manager; on a clean exit the finished file is renamed to ``path``, otherwise nothing is left behind.

    ``all_ranks``: the engine ranks every expert (``EngineOptions.all_ranks``), not the best ``2 * top_k``.
    """

    def __init__(
        self, path: str | Path, model: ModelSpec, run: dict[str, Any] | None = None, all_ranks: bool = False
    ) -> None:
        if not model.moe_layers:
            raise TraceError(f"a {model.family} model has no experts, so there is no routing to record")
        self._file = PartialFile(path)
        ranks = self._ranks = model.experts if all_ranks else min(2 * model.top_k, model.experts)
        self._schema = table_schema(
            TraceHeader(version=TRACE_VERSION, model=TracedModel.of(model), ranks=ranks, run=run or {})
        )
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._rows = 0
        try:
            self._writer = pq.ParquetWriter(self._file.partial, self._schema, compression="zstd")
        except (OSError, ValueError) as error:
            raise TraceError(f"cannot write trace '{path}': {getattr(error, 'strerror', None) or error}") from error

    def record(
        self,
        *,
        phases: list[str],
        step: int,
        sequences: NDArray[np.int32],
        positions: NDArray[np.int32],
        tokens: NDArray[np.int32],
        targets: list[int | None],
        drafts: list[int | None],
        confidences: list[float | None],
        draft_lengths: list[int],
        ranked: list[NDArray[np.int32]],
        scores: list[NDArray[np.float32]],
        resident: NDArray[np.bool_],
    ) -> None:
        """Add a pass. ``phases``: of each row; ``ranked``, ``scores``: (tokens, ranks) per MoE layer; ``resident``: (layers,
        experts)."""
        rows = len(tokens)
        if any(layer.shape != (rows, self._ranks) for layer in ranked):
            raise TraceError(
                f"the recorder takes {self._ranks} ranks per layer, the run gives {ranked[0].shape[1]}",
                "set all_ranks in both, or in neither",
            )
        columns = self._columns
        columns["step"].append(np.full(rows, step, np.int32))
        columns["phase"] += phases
        columns["sequence"].append(sequences)
        columns["position"].append(positions)
        columns["token"].append(tokens)
        columns["target"] += targets
        columns["draft"] += drafts
        columns["confidence"] += confidences
        columns["draft_length"] += draft_lengths
        columns["experts"].append(np.stack(ranked, axis=1).astype(np.uint16).reshape(-1))
        columns["scores"].append(np.stack(scores, axis=1).reshape(-1))
        columns["resident"] += [np.packbits(resident).tobytes(), *[None] * (rows - 1)]
        self._rows += rows
        if self._rows >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        arrays = []
        for field in self._schema:
            values: Any = self._columns[field.name]
            if values and isinstance(values[0], np.ndarray):
                values = np.concatenate(values)
            if pa.types.is_fixed_size_list(field.type):
                flat = pa.array(values, field.type.value_type)
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, field.type.list_size))
            else:
                arrays.append(pa.array(values, field.type))
        self._columns = {name: [] for name in self._schema.names}
        self._rows = 0
        try:
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        except OSError as error:
            raise TraceError(
                f"cannot write trace '{self._file.path}': {error.strerror or error}", "free some disk"
            ) from error

    def __enter__(self) -> TraceRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            if kind is None:
                self._file.finish()
        except OSError as failure:
            raise TraceError(f"cannot finish trace '{self._file.path}': {failure.strerror or failure}") from failure
        finally:
            self._file.discard()
