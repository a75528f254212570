"""Drives sequences through a continuous batch the way tests want them: joining late, in chunks, preempted at random."""

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.engine import Engine
from baton.engine.ledger import OutOfBlocks
from baton.engine.policies import policy
from baton.engine.preemption import PreemptionCounts
from baton.engine.sequence import Sequence

MOST_STEPS = 20_000


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a batch is driven. All ways give the same answers."""

    step_tokens: int = 64
    join_every: int = 1  # steps between one sequence's coming and the next's; 0: all come at once
    lookahead: bool = False
    swap_blocks: int = 0  # room for preempted KV
    ballast: int = 0  # seed; not 0: blocks are taken away and given back at random, so that sequences are preempted


def greedy(index: int, prompt: Seq[int], new_tokens: int, **sampling: object) -> Sequence:
    chosen = Sampling(max_tokens=new_tokens, **{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return Sequence(SequenceId(f"r/{index}"), tuple(prompt), chosen)


def run(engine: Engine, sequences: Seq[Sequence], way: Way | None = None) -> PreemptionCounts:
    """Until all have ended; every block comes back. The answers are in the sequences."""
    way = way or Way()
    swap_bytes = way.swap_blocks * engine.geometry.block_bytes
    batch = ContinuousBatch(
        engine, policy("fcfs"), step_tokens=way.step_tokens, swap_bytes=swap_bytes, lookahead=way.lookahead
    )
    waiting, ballast, dice, ended = list(sequences), [], random.Random(way.ballast), 0
    for step in range(MOST_STEPS):
        while waiting and (not way.join_every or step % way.join_every == 0):
            batch.add(waiting.pop(0), float(step))
            if way.join_every:
                break
        if way.ballast and dice.random() < 0.15:
            engine.ledger.release(ballast)
            ballast = _take(engine, dice)
        result = batch.step(float(step))
        if result is None and ballast:
            engine.ledger.release(ballast)
            ballast = []
        ended += len(result.ended) if result is not None else 0
        if ended == len(sequences):
            break
    engine.ledger.release(ballast)
    assert ended == len(sequences), "not all have ended"
    while batch.step(0.0) is not None:
        pass
    engine.ledger.check()
    assert engine.ledger.held_count == 0
    return batch.preemptions


def _take(engine: Engine, dice: random.Random) -> list:  # type: ignore[type-arg]
    """Most of what is available now."""
    try:
        return engine.ledger.allocate(int(engine.ledger.available * dice.choice([0.0, 1.0, 1.0, 1.0])))
    except OutOfBlocks:
        return []
