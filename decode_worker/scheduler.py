"""Who decodes in a step, and who gets a reservation. Pure: no clock, no ledger, no device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.ids import SequenceId


@dataclass(frozen=True, slots=True)
class Waiting:
    sequence_id: SequenceId
    blocks_needed: int  # for prompt and answer; cached ones count, since they are among the available


@dataclass(frozen=True, slots=True)
class StepPlan:
    run: tuple[SequenceId, ...]  # all rows of the step, those that join among them
    join: tuple[SequenceId, ...]


def plan_reservations(waiting: Iterable[Waiting], available: int) -> tuple[SequenceId, ...]:
    """Who gets blocks now: first come first. One that does not fit holds back all behind it, so none is starved."""
    granted: list[SequenceId] = []
    for request in waiting:
        if request.blocks_needed > available:
            break
        available -= request.blocks_needed
        granted.append(request.sequence_id)
    return tuple(granted)


def plan_step(running: Sequence[SequenceId], landed: Sequence[SequenceId], max_batch: int) -> StepPlan:
    """All that run go on, since their growth is reserved; those that have landed join while there are places."""
    join = tuple(landed[: max(max_batch - len(running), 0)])
    return StepPlan((*running, *join), join)
