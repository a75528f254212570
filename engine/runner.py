"""Runs the model: forward(batch) -> logits."""

import torch
from torch import Tensor

from .batch import Batch
from .kv_cache import KvCache
from .models import Model


class Runner:
    """One model over one pool. The one way through the model."""

    def __init__(self, model: Model, kv_cache: KvCache) -> None:
        self._model = model
        self._kv_cache = kv_cache

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Writes the KV of the batch's tokens.    -> logits [S', vocab] of the rows that the batch wants."""
        return self._model.forward(batch, self._kv_cache.pool)
