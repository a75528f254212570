"""Each side at its best variant, rounds interleaved, the median kept."""

import statistics
import time
from dataclasses import dataclass, replace

import numpy as np

from .sides import Side, Times, Variant
from .workloads import Workload

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Spread:
    """Milliseconds at the percentiles of PERCENTILES."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: np.ndarray) -> "Spread":
        return cls(*(np.percentile(seconds, PERCENTILES) * 1e3).tolist())


@dataclass(frozen=True)
class Round:
    """One side serving one workload once."""

    tokens_per_s: float  # of those that were asked for
    first_token_ms: Spread  # from the start of the wave, when all its jobs are there
    inter_token_ms: Spread


@dataclass(frozen=True)
class Result:
    workload: str
    side: str
    threads: int
    batch: int  # sequences at once; 0: the side has no such choice
    tokens_per_s: float
    first_token_ms: Spread
    inter_token_ms: Spread
    rounds: tuple[float, ...]  # tokens/s of each


def play(side: Side, variant: Variant, work: Workload) -> Round:
    seconds, firsts, between = 0.0, [], []
    with side.open(variant, work) as serve:
        for wave in work.waves:
            begin = time.perf_counter()
            times: Times = serve(wave)
            seconds += time.perf_counter() - begin
            firsts += [one[0] for one in times]
            between += [np.diff(one) for one in times]
    return Round(work.new_tokens / seconds, Spread.of(np.array(firsts)), Spread.of(np.concatenate(between)))


def best_variant(side: Side, work: Workload, threads: tuple[int, ...]) -> Variant:
    """By tokens/s of one run each: batch sizes with the first thread count, then the best one with the others."""
    rates: dict[Variant, float] = {}
    for variant in side.variants(work):
        first = replace(variant, threads=threads[0])
        rates[first] = play(side, first, work).tokens_per_s
    best = max(rates, key=rates.__getitem__)
    for count in threads[1:]:
        rates[replace(best, threads=count)] = play(side, replace(best, threads=count), work).tokens_per_s
    return max(rates, key=rates.__getitem__)


def compare(sides: list[Side], work: Workload, threads: tuple[int, ...], rounds: int) -> list[Result]:
    """The choice of variants warms everything up."""
    chosen = [(side, best_variant(side, work, threads)) for side in sides]
    played: list[list[Round]] = [[] for _ in chosen]
    for _ in range(rounds):
        for (side, variant), mine in zip(chosen, played, strict=True):
            mine.append(play(side, variant, work))
    return [_result(work, side, variant, mine) for (side, variant), mine in zip(chosen, played, strict=True)]


def _result(work: Workload, side: Side, variant: Variant, rounds: list[Round]) -> Result:
    return Result(
        workload=work.name,
        side=side.name,
        threads=variant.threads,
        batch=variant.batch,
        tokens_per_s=statistics.median(one.tokens_per_s for one in rounds),
        first_token_ms=_median([one.first_token_ms for one in rounds]),
        inter_token_ms=_median([one.inter_token_ms for one in rounds]),
        rounds=tuple(one.tokens_per_s for one in rounds),
    )


def _median(spreads: list[Spread]) -> Spread:
    return Spread(
        p50=statistics.median(one.p50 for one in spreads),
        p95=statistics.median(one.p95 for one in spreads),
        p99=statistics.median(one.p99 for one in spreads),
    )
