"""Decode steps as captured graphs, one for each of some sizes of batch, to the next of which a step is padded.

A replay is one launch where a step is some hundreds, and finds its input where its capture read it:

    host --one copy--> the graph's input (rows, lengths, positions, slots) | what changes in the tables
    replay: tokens and block tables of the rows -> all layers -> logits, at a fixed address

A row that pads is nobody's: it has no context and no slot. The logits are the next replay's too: what is made of them
is launched before it, on the same stream.

Of ranks that share a model each captures the same graphs, in the same order, and replays the same: what their kernels
count, they count on the device.
"""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..kernels.paged_attention import Workspace
from .batch import DeviceTables, changes_of
from .models import Model
from .staging import Array, size_of
from .step_input import I64, StepInput

SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 513, 64))
NO_SLOT = -1

_CHANGES = 64 << 10  # bytes: room for a block more in every row, and for a long prompt's

Replay: TypeAlias = Callable[[], None]
Capture: TypeAlias = Callable[[Callable[[], None]], Replay]
"""Runs something once to prepare it and again to record it; gives what repeats its launches."""


class CudaCapture:
    """CUDA graphs that share one pool of memory: no two may be under way at once."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's own

    def __call__(self, run: Callable[[], None]) -> Replay:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # what is made at the first use, such as a workspace of cuBLAS, is made outside the graph
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        replay: Replay = graph.replay
        return replay


class DecodeGraphs:
    """The graphs of one model over one pool."""

    def __init__(
        self, model: Model, pool: Tensor, tables: DeviceTables, sizes: Iterable[int], capture: Capture
    ) -> None:
        """Captures all, the largest first: the others find room in its memory."""
        self._tables = tables
        self._sizes = np.array(sorted(sizes), np.int64)
        most = int(self._sizes[-1])
        none = StepInput.empty()
        room = size_of(self._rows(none, most)) + _CHANGES
        self._input = torch.zeros(room, dtype=torch.uint8, device=pool.device)
        width = model.config.vocab_size if model.head.communicator.rank == 0 else 0  # no other rank gets logits
        self._logits = torch.empty(most, width, dtype=model.dtype, device=pool.device)

        self._workspace = workspace = Workspace()  # a capture knows its address, and keeps nothing alive

        def recorded(size: int) -> Replay:
            rows, lens, positions, slots = tables.staging.send(self._rows(none, size), self._input)

            def run() -> None:
                batch = tables.decode_batch(rows, lens, positions, slots, workspace=workspace)
                self._logits[:size].copy_(model.forward(batch, pool))

            return capture(run)

        self._replays = {size: recorded(size) for size in reversed(self._sizes.tolist())}

    def forward(self, step: StepInput) -> Tensor | None:
        """Logits, as `Model.forward` gives them, of a step in which every row decodes; None, and nothing done, for one
        that none serves."""
        count = len(step.decode_rows)
        if not 0 < count <= self._sizes[-1] or len(step.chunk_rows):
            return None
        size = int(self._sizes[self._sizes.searchsorted(count)])
        arrays = [*self._rows(step, size), *changes_of(step)]
        if size_of(arrays) > len(self._input):
            return None
        rows, _, _, _, *changes = self._tables.staging.send(arrays, self._input)
        self._tables.change(step, iter(changes))
        self._tables.expect(rows[:count])
        self._replays[size]()
        return self._logits[:count]

    def _rows(self, step: StepInput, size: int) -> list[Array]:
        """What `DeviceTables.decode_batch` takes, filled up with nobody's rows."""
        lens = np.zeros(size, np.int32)
        lens[: len(step.decode_rows)] = step.positions + 1
        return [
            _filled(step.decode_rows, size, self._tables.nobody),
            lens,
            _filled(step.positions, size, 0),
            _filled(step.slots, size, NO_SLOT),
        ]


def _filled(values: I64, size: int, value: int) -> I64:
    filled = np.full(size, value, np.int64)
    filled[: len(values)] = values
    return filled
