"""Attention of one step: decode rows and prompt chunks, each by its own kernel."""

import torch
from torch import Tensor

from ..kernels.paged_attention import paged_decode_attention
from ..kernels.prefill_attention import paged_prefill_attention
from .batch import Batch


def attend(q: Tensor, pool: Tensor, layer: int, scale: float, window: int | None, batch: Batch) -> Tensor:
    """Each row over its own sequence's context.    q [T, H, D], pool [N, L, 2, G, P, D] -> [T, H, D]."""
    decode, prefill, count = batch.decode, batch.prefill, batch.num_decode
    parts = []
    if decode is not None:
        tables, lens = decode.block_tables, decode.context_lens
        parts.append(paged_decode_attention(q[:count], pool, layer, tables, lens, scale, window, plan=decode.plan))
    if prefill is not None:
        starts, contexts = prefill.query_starts, prefill.context_lens
        parts.append(
            paged_prefill_attention(
                q[count:], pool, layer, prefill.block_tables, starts, contexts, scale, window, plan=prefill.plan
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)
