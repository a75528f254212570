"""Which prompts a prefill step works on, and how far. Pure: no clock, no ledger, no device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.ids import SequenceId


@dataclass(frozen=True, slots=True)
class Waiting:
    sequence_id: SequenceId
    blocks_needed: int  # for the whole prompt; cached ones count, since they are among the available
    expected: bool  # a decode worker waits for its KV, or nobody has to: once computed it is soon gone


@dataclass(frozen=True, slots=True)
class Running:
    sequence_id: SequenceId
    remaining: int  # prompt tokens still to compute, at least 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    chunks: tuple[tuple[SequenceId, int], ...]  # how many tokens of whose prompt


def plan_starts(
    waiting: Iterable[Waiting], running: int, available: int, max_batch: int, spare: int
) -> tuple[SequenceId, ...]:
    """Who begins now, in the order given (those expected, then the others), while blocks and places last. One that does
    not fit holds back all behind it, so that a long prompt is never starved by short ones.

    The others leave `spare` blocks, enough for any prompt, to those expected. Else a circle could close: our blocks
    held by prompts that wait for decode workers' blocks, and those reserved for prompts that wait here.
    """
    started: list[SequenceId] = []
    for prompt in waiting:
        kept = 0 if prompt.expected else spare
        if running + len(started) >= max_batch or prompt.blocks_needed + kept > available:
            break
        available -= prompt.blocks_needed
        started.append(prompt.sequence_id)
    return tuple(started)


def plan_step(running: Sequence[Running], budget: int) -> StepPlan:
    """Share one step's tokens: first come first, each as much of its prompt as is left of the budget."""
    chunks: list[tuple[SequenceId, int]] = []
    for prompt in running:
        count = min(prompt.remaining, budget)
        if count == 0:
            break
        chunks.append((prompt.sequence_id, count))
        budget -= count
    return StepPlan(tuple(chunks))
