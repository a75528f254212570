"""A token drawn from each of some rows of logits, by a number that is a function of (seed, branch, position) alone.

What is drawn for a row depends on its logits and parameters, never on the rows beside it: the way to draw, too, is
chosen by the row's own parameters, and the ways that rank tokens agree to the bit on a CPU.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.request import Sampling
from .ranking import best_first, parts

Numbers = npt.NDArray[np.uint64]

_SHORT = 1024  # a larger top_k is cheaper to sort than to select


class Way(IntEnum):
    """How a token is chosen."""

    GREEDY = 0  # no draw: the best
    WHOLE = 1  # along all tokens, best first: nothing is filtered out
    SHORT = 2  # along the top_k best, best first
    LONG = 3  # along as many of all as top_p and min_p leave, best first


def way_of(sampling: Sampling, vocab_size: int) -> Way:
    limited = 0 < sampling.top_k < vocab_size
    if np.float32(sampling.temperature) == 0 or sampling.top_k == 1:
        return Way.GREEDY
    if limited and sampling.top_k <= _SHORT:
        return Way.SHORT
    if limited or sampling.top_p < 1 or sampling.min_p > 0:
        return Way.SHORT if vocab_size <= _SHORT else Way.LONG
    return Way.WHOLE


@dataclass(frozen=True, slots=True)
class DrawRows:
    """D rows of the logits from which tokens are drawn in the same way. Tensors are on the logits' device."""

    way: Way
    at: Tensor | None  # [D] i64; None: all rows, in order
    temperature: Tensor  # [D, 1] f32; above 0
    top_k: Tensor  # [D, 1] i64; in [1, V]
    top_p: Tensor  # [D, 1] f64; infinite where it filters nothing
    min_p: Tensor  # [D, 1] f64; above 0, so that what can't be chosen is always filtered out
    numbers: Tensor  # [D, 1] f64 in [0, 1)
    most: int  # the largest top_k

    def part(self, rows: slice) -> "DrawRows":
        return replace(
            self,
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            numbers=self.numbers[rows],
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """What the filters leave of D rows: the first `length` of the ranked tokens, since every filter keeps the best."""

    sums: Tensor  # [D, K] f64: running sums of the weights, of which the best token's is 1
    length: Tensor  # [D, 1] i64; in [1, K]
    certain: Tensor  # [D, 1] bool: no token behind the K would be kept as well


def uniform(seeds: Numbers, branches: Numbers, positions: Numbers) -> npt.NDArray[np.float64]:
    """[0, 1), 53 bits, of each (seed, branch, position).    All [S] u64 -> [S] f64.

    Three rounds of splitmix64's finaliser (Steele, Lea and Flood, 2014), one per part, so that neighbours in any part
    are as far apart as strangers.
    """
    return uniform_at(streams_of(seeds, branches), positions)


def streams_of(seeds: Numbers, branches: Numbers) -> Numbers:
    """The part of `uniform` that stays the same along an answer."""
    state = _mix(seeds + np.uint64(0x9E3779B97F4A7C15))
    return _mix(state ^ (branches + np.uint64(0xD1B54A32D192ED03)))


def uniform_at(streams: Numbers, positions: Numbers) -> npt.NDArray[np.float64]:
    """The rest of it."""
    state = _mix(streams ^ (positions + np.uint64(0x8CB92BA72F3D8DD7)))
    high: npt.NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64)
    return high * 2.0**-53


def _mix(state: Numbers) -> Numbers:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Numbers = state ^ (state >> np.uint64(31))
    return mixed


def draw(values: Tensor, best: Tensor, rows: DrawRows) -> Tensor:
    """One token for each of the D rows; any token where a row has NaN.    values [S, V] f32; best [S] i64 -> [D] i64

    Nothing here waits for a GPU.
    """
    count = len(rows.numbers)
    drawn = []
    for part in parts(count, values.shape[1], values.device):
        at = part if rows.at is None else rows.at[part]
        drawn.append(_WAYS[rows.way](values[at], best[at][:, None], rows.part(part)))
    return torch.cat(drawn)[:, 0]


def _draw_whole(values: Tensor, best: Tensor, rows: DrawRows) -> Tensor:
    """Along all tokens, best first. A walk in the order of ids would need no ranking, but it crosses the boundaries of
    all tokens where the sums are least exact: a rounding error of 1e-6 in the logits, as computing a prompt again in
    other chunks makes, then changed one token in five hundred; best first, most of the sum is behind few boundaries.
    """
    total = _weights(values, values.gather(1, best), rows.temperature).cumsum_(-1)[:, -1:]
    if values.device.type != "cpu":
        return _walk(values, values.shape[1], total, rows)
    # The best thousand nearly always hold the token; whether they do, a CPU sees at no cost.
    drawn = _walk(values, min(_SHORT, values.shape[1]), total, rows)
    for row in (drawn[:, 0] < 0).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        drawn[one] = _walk(values[one], values.shape[1], total[one], rows.part(one))
    return drawn


def _walk(values: Tensor, count: int, total: Tensor, rows: DrawRows) -> Tensor:
    """The token at which the running sum of the `count` best passes the number's share of the total; -1: none of them.

    -> [D, 1] i64
    """
    ranked, ids = best_first(values, count)
    weights = _weights(ranked, ranked[:, :1], rows.temperature)
    sums = weights.cumsum(-1)
    index = torch.searchsorted(sums, rows.numbers * total, right=True)
    if count == values.shape[1]:  # summed in another order, the total may lie a rounding error beyond the last sum
        index = torch.minimum(index, (weights > 0).sum(-1, keepdim=True) - 1)
    return torch.where(index < count, ids.gather(1, index.clamp(0, count - 1)), -1)


def _draw_short(values: Tensor, best: Tensor, rows: DrawRows) -> Tensor:
    ranked, ids = best_first(values, rows.most)
    return ids.gather(1, _drawn_rank(kept(ranked, rows, values.shape[1]), rows))


def _draw_long(values: Tensor, best: Tensor, rows: DrawRows) -> Tensor:
    total = _weights(values, values.gather(1, best), rows.temperature).cumsum_(-1)[:, -1:]
    if values.device.type != "cpu":
        return _draw_sorted(values, total, rows)
    # The best thousand nearly always hold all that is kept, and to look whether they do costs a CPU nothing.
    vocab_size = values.shape[1]
    ranked, ids = best_first(values, _SHORT)
    found = kept(ranked, rows, vocab_size, total)
    drawn = ids.gather(1, _drawn_rank(found, rows))
    for row in (~found.certain[:, 0]).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        drawn[one] = _draw_sorted(values[one], total[one], rows.part(one))
    return drawn


def _draw_sorted(values: Tensor, total: Tensor, rows: DrawRows) -> Tensor:
    ranked, ids = best_first(values, values.shape[1])
    return ids.gather(1, _drawn_rank(kept(ranked, rows, values.shape[1], total), rows))


_WAYS = {Way.WHOLE: _draw_whole, Way.SHORT: _draw_short, Way.LONG: _draw_long}


def _weights(values: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities over that of the best token.    [D, V] f32, [D, 1], [D, 1] -> [D, V] f64"""
    return ((values - best) / temperature).double().exp_()  # the best at 0: a tiny temperature can't overflow


def kept(ranked: Tensor, rows: DrawRows, vocab_size: int, total: Tensor | None = None) -> Kept:
    """top-k, then top-p of what that left, then min-p.    ranked [D, K] f32: the K best, best first

    total [D, 1] f64: the weight of all tokens; may be left out when K holds the top_k of every row.
    """
    width = ranked.shape[1]
    weights = _weights(ranked, ranked[:, :1], rows.temperature)
    sums = weights.cumsum(-1)
    mass = sums.gather(1, rows.top_k.clamp(max=width) - 1)
    known = rows.top_k <= width
    if total is not None:
        unlimited = rows.top_k == vocab_size
        mass, known = torch.where(unlimited, total, mass), known | unlimited
    # A token stays while those before it have less than top_p: as many as have a smaller sum, and the one that reaches.
    in_top_p = torch.searchsorted(sums, rows.top_p * mass) + 1
    in_min_p = (weights >= rows.min_p).sum(-1, keepdim=True)
    length = torch.minimum(torch.minimum(in_top_p, in_min_p), rows.top_k).clamp(1, width)
    inside = (in_top_p <= width) | (in_min_p < width) | (rows.top_k <= width)
    return Kept(sums, length, known & inside)


def _drawn_rank(found: Kept, rows: DrawRows) -> Tensor:
    """Which of the kept is drawn: the first whose running sum passes the number's share of all.    -> [D, 1] i64"""
    last = found.length - 1
    target = rows.numbers * found.sums.gather(1, last)
    return torch.minimum(torch.searchsorted(found.sums, target, right=True), last)
