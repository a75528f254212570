"""First-token time of prompts whose beginning is in the prefix cache, beside the same prompts without it."""

import statistics
from dataclasses import dataclass

from .sides import Baton, Variant
from .workloads import Dice, Job, Workload

SHARE = 0.9
_PROMPTS = 7


@dataclass(frozen=True)
class Shared:
    prompt_tokens: int
    cached_tokens: int  # whole blocks of the shared part
    threads: int
    without_ms: float
    with_ms: float

    @property
    def times(self) -> float:
        return self.without_ms / self.with_ms


def shared_prompt(side: Baton, dice: Dice, prompt_tokens: int, threads: int) -> Shared:
    """Medians over prompts that share their first 90 %, asked one by one, with and without turn by turn."""
    shared = int(prompt_tokens * SHARE)
    head = dice.prompt(shared)
    without: list[float] = []
    cached: list[float] = []
    with side.open(Variant(threads), Workload("shared", ())):
        for _ in range(_PROMPTS + 1):
            job = Job(head + dice.prompt(prompt_tokens - shared), 1)
            side.engine.ledger.drop_cached()
            without.append(side.serve((job,))[0][0])
            side.serve((Job(head, 1),), keep_cached=True)
            cached.append(side.serve((job,))[0][0])
    return Shared(
        prompt_tokens=prompt_tokens,
        cached_tokens=shared - shared % side.engine.geometry.block_tokens,
        threads=threads,
        without_ms=statistics.median(without[1:]) * 1e3,  # the first warms up
        with_ms=statistics.median(cached[1:]) * 1e3,
    )
