"""Carries a step out on one device: forward, then, apart from it, what was sampled."""

import torch
from torch import Tensor

from ..kernels.prefill_attention import is_tiled
from .batch import DeviceTables
from .decode_graphs import SIZES, Capture, DecodeGraphs
from .kv_cache import KvCache
from .models import Model
from .step_input import StepInput


class Executor:
    """One model over one pool, and the tables that feed it. The one way through the model.

    Called in inference mode. Nothing here waits for the device. Two steps may be under way: the stream keeps their
    order, and a decoding row reads the token that the step before it sampled where that left it.
    """

    def __init__(
        self, model: Model, kv_cache: KvCache, max_rows: int, max_blocks: int, capture: Capture | None = None
    ) -> None:
        """capture: how decode steps become graphs, see decode_graphs.py; None: they are launched op by op.

        An exact model's logits are bit for bit the same whatever else is in a step, and however prompts are cut: by
        exact kernels, or, where there are none, since each token passes through the model by itself.
        """
        self._model = model
        self._kv_cache = kv_cache
        windows = frozenset(model.config.windows)
        self._tables = DeviceTables(kv_cache.pool, max_rows, max_blocks, windows, model.exact)
        self._one_by_one = model.exact and not is_tiled(kv_cache.pool)
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            sizes = {*(size for size in SIZES if size < max_rows), min(max_rows, SIZES[-1])}
            self._graphs = DecodeGraphs(model, kv_cache.pool, self._tables, sizes, capture)

    def forward(self, step: StepInput) -> Tensor:
        """Writes the KV of the step's tokens.    -> logits [S', vocab] of those wanted, good until the next."""
        if len(step.copy_from):
            self._copy_blocks(step)
        if self._one_by_one:
            parts = [self._model.forward(batch, self._kv_cache.pool) for batch in self._tables.one_by_one(step)]
            return torch.cat(parts)
        logits = None if self._graphs is None else self._graphs.forward(step)
        return self._model.forward(self._tables.batch(step), self._kv_cache.pool) if logits is None else logits

    def accept(self, token_ids: Tensor) -> None:
        """What was sampled for the last step's `sampled_rows`: their next step reads it.    token_ids [S'] i64"""
        self._tables.accept(token_ids)

    def _copy_blocks(self, step: StepInput) -> None:
        source, target = self._tables.staging.send((step.copy_from, step.copy_to))
        blocks = self._kv_cache.block_bytes_view
        blocks.index_copy_(0, target, blocks.index_select(0, source))
