"""Weights that begin to come from memory before the product that reads them: while ranks meet, or a short context is
attended to, the memory has nothing else to do."""

import torch
from torch import Tensor

from .build import cuda_library, stream, whole_vectors

# 0 asks for nothing. On two H200 a token took 2.66 ms so, 2.96 with 16 MB and 3.22 with 32: benchmarks/tp_engine.py.
SUM_BYTES = 0  # of the next weight, while a sum of few rows is under way: see peer_sum.py
ATTENTION_BYTES = 0  # of the output projection, while few tokens attend

_MOST_ROWS = 64  # more keep the memory busy themselves


def fetch_ahead(weight: Tensor, rows: int) -> None:
    """weight [O, I], which nothing writes and a product of so many rows reads after what is launched next."""
    if not ATTENTION_BYTES or rows > _MOST_ROWS:
        return
    library = cuda_library(weight.device)
    if library is not None:
        library.fetch_ahead(*asked(weight, ATTENTION_BYTES), stream(weight.device))


def asked(weight: Tensor | None, most_bytes: int) -> tuple[int | None, int, int, int]:
    """(where it is, bytes of a row, rows, bytes to ask for of each row), no more than so many of all together."""
    if weight is None or weight.layout != torch.strided or weight.ndim != 2 or not whole_vectors(weight):
        return None, 0, 0, 0
    rows, row_bytes = len(weight), weight.shape[1] * weight.element_size()
    return weight.data_ptr(), row_bytes, rows, min(row_bytes, most_bytes // rows // 128 * 128)
