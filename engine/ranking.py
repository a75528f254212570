"""The best tokens of each row of logits, ties always in the order of their ids, at any size of batch."""

from collections.abc import Iterator

import torch
from torch import Tensor

_SORTED_FROM = 1024  # as many of the best or more: a sort is no slower


def parts(rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Cut rows of logits into pieces whose temporaries stay in a CPU's cache, or small beside a GPU's weights.

    One piece at least, if an empty one.
    """
    elements = 1 << (19 if device.type == "cpu" else 23)
    step = max(1, elements // vocab_size)
    return (slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step))


def first_best(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and where it stands first; NaN, and where one stands, where there is one.

    values [S, V] f32 -> [S] f32, [S] i64
    """
    if values.device.type != "cpu":
        largest, at = values.max(-1)
        return largest, at
    at = torch.from_numpy(values.numpy().argmax(-1))  # torch's reads one number at a time: a tenth as fast
    return values.gather(1, at[:, None])[:, 0], at


def best_first(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each row, best first, ties by rising id.    values [S, V] f32 -> [S, count] f32, ids i64

    What a stable sort would begin with. torch.topk promises no order among equals, and logits that were bfloat16 have
    many: it ranks unique keys instead, the logit's bits above the id's.
    """
    vocab_size = values.shape[1]
    if count > _SORTED_FROM or count == vocab_size:
        ranked, ids = torch.sort(values, dim=-1, descending=True, stable=True)
        return ranked[:, :count], ids[:, :count]
    bits = (values + 0.0).view(torch.int32)  # -0.0 equals 0.0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # as integers in the order of the numbers
    keys <<= 32
    keys |= torch.arange(vocab_size - 1, -1, -1, device=values.device)
    ids = vocab_size - 1 - (keys.topk(count, -1).values & 0xFFFFFFFF)
    return values.gather(1, ids), ids
