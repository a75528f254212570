"""What a worker that writes answers does with them, however the prompts' KV came: admit, give tokens on, end.

One batch decides who runs; this owns who is here for which router, and says on the links what has come of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import time_ns
from typing import Generic, Self, TypeVar

from ..core.errors import BatonError, RequestConflict
from ..core.request import Ended, EndReason, Load, Request
from ..engine.continuous_batch import ContinuousBatch
from ..engine.engine import Engine
from ..engine.members import Goal
from ..engine.sequence import Sequence
from ..engine.step_result import StepResult
from ..observe import names
from .outbox import Outbox
from .reporting import Reporter
from .roster import Limits, Member, Roster, failed
from .tokens import give_tokens, tag_of


@dataclass(slots=True, kw_only=True)
class Answer(Member):
    """One sequence of a worker that writes answers."""

    sequence: Sequence
    started_ns: int = 0  # 0: it still waits
    decoding_ns: int = 0  # 0: its first token is not here yet

    @classmethod
    def of(cls, link: int, request: Request, arrived_ns: int, now: float) -> Self:
        """now: on the loop's clock."""
        return cls(
            link, request, arrived_ns, request.deadline(now), sequence=Sequence.of(request, tag_of(link, request))
        )


A = TypeVar("A", bound=Answer)


class Answering(Generic[A]):
    """Owns the roster and the batch of such a worker. Called by the step loop's thread alone."""

    def __init__(
        self,
        engine: Engine,
        batch: ContinuousBatch,
        outbox: Outbox,
        reporter: Reporter,
        limits: Limits,
        now_ns: Callable[[], int] = time_ns,
    ) -> None:
        self.roster: Roster[A] = Roster(limits)
        self.batch = batch
        self.now_ns = now_ns
        self._engine = engine
        self._outbox = outbox
        self._reporter = reporter

    def admit(self, answer: A, goal: Goal, now: float) -> None:
        """A new sequence waits in the batch, or its router learns why not."""
        request = answer.request
        # The last token of an answer is never computed, so its KV needs no place.
        tokens = len(request.prompt) + request.sampling.max_tokens - 1
        error = self.roster.admit(answer, -(-tokens // self._engine.geometry.block_tokens))
        if error is None:
            self.batch.add(answer.sequence, now, goal)
        else:
            self._outbox.ended(answer.link, failed(request.sequence_id, error))

    def of(self, sequence: Sequence) -> A:
        """Whose sequence it is."""
        answer = self.roster.get(sequence.sequence_id)
        assert answer is not None, sequence.sequence_id
        return answer

    def is_new(self, link: int, request: Request) -> bool:
        """Nobody has its id yet. A request that another router has given the same id is refused."""
        known = self.roster.get(request.sequence_id)
        if known is not None and known.link != link:
            conflict = RequestConflict("another router's request has this id")
            self._outbox.ended(link, failed(request.sequence_id, conflict))
        return known is None

    def started(self, answer: A) -> None:
        """It has blocks. Again, after it was preempted: nothing."""
        if not answer.started_ns:
            answer.started_ns = self.now_ns()
            self.roster.start(answer)
            self._reporter.cached(answer.sequence.cached_tokens)
            self._reporter.part(answer, names.SPAN_QUEUE, answer.arrived_ns, answer.started_ns)

    def take(self, result: StepResult, seconds: float) -> None:
        """Give on what a step has brought, and end what has come to its end."""
        self._reporter.step(result, seconds)
        self._reporter.preempted(self.batch.preemptions)
        for sequence in give_tokens(self._outbox, self.roster, result.tokens):
            self._first_token(self.of(sequence))
        for sequence, reason in result.ended:
            answer = self.of(sequence)
            if isinstance(reason, BatonError):
                self.end(answer, EndReason.FAILED, reason)
            else:
                self.end(answer, reason)

    def end(self, answer: A, reason: EndReason, error: BatonError | None = None) -> None:
        """The one way out: the batch gives every block back."""
        self.roster.remove(answer)
        self.batch.remove(answer.sequence)
        if answer.decoding_ns:
            count = len(answer.sequence.tokens)
            counts = ((names.GEN_AI_USAGE_OUTPUT, count), (names.STEPS, count))
            self._reporter.part(answer, names.SPAN_DECODE, answer.decoding_ns, self.now_ns(), counts)
        ended = failed(answer.sequence_id, error) if error else Ended(sequence_id=answer.sequence_id, reason=reason)
        self._outbox.ended(answer.link, ended)

    def _first_token(self, answer: A) -> None:
        answer.decoding_ns = self.now_ns()
        counts = (
            (names.GEN_AI_USAGE_INPUT, len(answer.request.prompt)),
            (names.GEN_AI_USAGE_CACHED, answer.sequence.cached_tokens),
        )
        self._reporter.part(answer, names.SPAN_PREFILL, answer.started_ns, answer.decoding_ns, counts)

    def load(self) -> Load:
        ledger = self._engine.ledger
        return Load(
            running=self.batch.running,
            waiting=self.batch.waiting,
            waiting_tokens=self.batch.tokens_ahead(),
            free_blocks=ledger.available,
            total_blocks=ledger.num_blocks,
            draining=self.roster.draining,
        )
