"""The policy of a worker that does both: a prompt's chunks share their steps with the answers that are being written.

    waiting -> running (chunks, then one token a step) -> ended

No KV moves between workers. For light loads this is the better choice, and it is what disaggregation is compared with.
"""

from collections.abc import Callable
from time import perf_counter, time_ns

from ..core.errors import DeadlineExceeded
from ..core.frames import Command, HandOver, Hello, Release
from ..core.request import EndReason, Request
from ..engine.continuous_batch import ContinuousBatch
from ..engine.engine import Engine
from ..engine.members import Goal
from ..kv_transfer.messages import Delivery
from ..worker.answering import Answer, Answering
from ..worker.loop import LinkClosed, RoleState, Survey
from ..worker.outbox import Outbox
from ..worker.reporting import Reporter
from ..worker.roster import Limits


class ColocatedRole:
    """See worker/loop.py's Role."""

    def __init__(
        self,
        engine: Engine,
        batch: ContinuousBatch,
        outbox: Outbox,
        reporter: Reporter,
        limits: Limits,
        *,
        now_ns: Callable[[], int] = time_ns,
    ) -> None:
        self._answers: Answering[Answer] = Answering(engine, batch, outbox, reporter, limits, now_ns)
        self._batch = batch
        self._now_ns = now_ns

    def command(self, link: int, command: Command | LinkClosed, now: float) -> None:
        answers = self._answers
        match command:
            case Request():
                if answers.is_new(link, command):
                    answers.admit(Answer.of(link, command, self._now_ns(), now), Goal.ANSWER, now)
            case Release(sequence_id=sequence_id):
                released = answers.roster.get_of(link, sequence_id)
                if released is not None:
                    answers.end(released, EndReason.RELEASED)
            case LinkClosed():
                for answer in answers.roster.of_link(link):
                    answers.end(answer, EndReason.RELEASED)
            case Hello() | HandOver():
                return  # the service has answered the one; the other is for prefill workers

    def deliver(self, delivery: Delivery, now: float) -> None:
        return  # nothing is lent here and nothing lands; a source's lease ends without us

    def step(self, now: float) -> bool:
        answers = self._answers
        for answer in answers.roster.expired(now):
            answers.end(answer, EndReason.FAILED, DeadlineExceeded("the request's deadline passed"))
        begin = perf_counter()
        result = self._batch.step(now)
        if result is None:
            return False
        for sequence in result.started:
            answers.started(answers.of(sequence))
        answers.take(result, perf_counter() - begin)
        return True

    def state(self, *, drain: bool = False) -> RoleState:
        self._answers.roster.draining |= drain
        return RoleState(self._answers.load(), len(self._answers.roster))

    def lent_blocks(self) -> int:
        return 0

    def survey(self) -> Survey:
        return Survey(tuple(self._batch.holders()), self._answers.roster.next_deadline())
