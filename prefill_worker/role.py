"""The policy of a prefill worker.

waiting -> running (chunks) -> first token -> lent until the reader has committed -> ended
                                    \\-> ended: the answer is complete with it

Prompts that a decode worker waits for come first. The others leave room for any one of those: else a circle could
close, our blocks held by prompts that wait for decode workers' blocks, and those reserved for prompts that wait here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, time_ns

from ..core.errors import BatonError, DeadlineExceeded, LeaseExpired, RequestConflict, StaleEpoch, from_code
from ..core.frames import Command, HandOver, Hello, Release
from ..core.ids import SequenceId
from ..core.request import Ended, EndReason, Load, Request
from ..core.tickets import Ticket
from ..engine.continuous_batch import ContinuousBatch
from ..engine.engine import Engine
from ..engine.members import Goal
from ..engine.sequence import Sequence
from ..engine.step_result import StepResult
from ..kv_transfer.messages import Delivery, PeerLost, Returned
from ..observe import names
from ..worker.lending import Lending, Loan, LoanFailed
from ..worker.loop import LinkClosed, RoleState, Survey
from ..worker.outbox import Outbox
from ..worker.reporting import Reporter, transfer_attributes
from ..worker.roster import Limits, Member, Roster, failed
from ..worker.tokens import give_tokens


@dataclass(slots=True, kw_only=True)
class Prompt(Member):
    """One sequence on a prefill worker."""

    sequence: Sequence
    started_ns: int = 0  # 0: it still waits
    chunks: int = 0
    first_token: int | None = None
    offered_ns: int = 0  # 0: nothing was announced
    ticket_by: float | None = None  # when computed and nobody has come for the KV


class PrefillRole:
    """See worker/loop.py's Role."""

    def __init__(
        self,
        engine: Engine,
        batch: ContinuousBatch,
        lending: Lending,
        outbox: Outbox,
        reporter: Reporter,
        limits: Limits,
        *,
        ticket_timeout_s: float,
        now_ns: Callable[[], int] = time_ns,
    ) -> None:
        self._ledger = engine.ledger
        self._block_tokens = engine.geometry.block_tokens
        self._largest = self._blocks_for(limits.max_model_len)
        self._batch = batch
        self._lending = lending
        self._outbox = outbox
        self._reporter = reporter
        self._ticket_timeout_s = ticket_timeout_s
        self._now_ns = now_ns
        self._roster: Roster[Prompt] = Roster(limits)

    # What others say

    def command(self, link: int, command: Command | LinkClosed, now: float) -> None:
        match command:
            case Request():
                self._admit(link, command, now)
            case HandOver(sequence_id=sequence_id, ticket=ticket):
                self._hand_over(link, sequence_id, ticket, now)
            case Release(sequence_id=sequence_id):
                prompt = self._roster.get_of(link, sequence_id)
                if prompt is not None:
                    self._end(prompt, EndReason.RELEASED)
            case LinkClosed():
                for prompt in self._roster.of_link(link):
                    self._end(prompt, EndReason.RELEASED)
            case Hello():
                return  # the service has answered it

    def deliver(self, delivery: Delivery, now: float) -> None:
        message = delivery.message
        if isinstance(message, PeerLost):
            self._end_loans(self._lending.lost(message.inbox))
            return
        if not isinstance(message, Returned):
            return  # a piece: nobody may announce to a prefill worker, and its source's lease ends without us
        loan = self._lending.returned(message)
        prompt = self._roster.get(message.sequence_id)
        if loan is None or prompt is None:
            return
        self._report_offer(prompt, loan)
        if not message.error_code:
            self._end(prompt, EndReason.HANDED_OVER)
        else:
            self._fail(prompt, from_code(message.error_code, message.error_message))

    # One step

    def step(self, now: float) -> bool:
        self._expire(now)
        begin = perf_counter()
        result = self._batch.step(now)
        if result is None:
            return False
        for sequence in result.started:
            self._started(self._of(sequence))
        advanced = [self._of(sequence) for sequence in result.advanced if sequence.sequence_id in self._roster]
        for prompt in advanced:
            prompt.chunks += 1
        self._reporter.step(result, perf_counter() - begin)
        self._reporter.preempted(self._batch.preemptions)
        self._first_tokens(result, now)
        for prompt in advanced:
            if self._roster.get(prompt.sequence_id) is prompt:
                self._announce(prompt, now)
        return True

    def state(self, *, drain: bool = False) -> RoleState:
        self._roster.draining |= drain
        load = Load(
            running=self._batch.running,
            waiting=self._batch.waiting,
            waiting_tokens=self._batch.tokens_ahead(),
            free_blocks=self._ledger.available,
            total_blocks=self._ledger.num_blocks,
            draining=self._roster.draining,
        )
        return RoleState(load, len(self._roster) + self._lending.open_loans())

    def lent_blocks(self) -> int:
        return self._lending.lent_blocks()

    def survey(self) -> Survey:
        deadlines = [self._roster.next_deadline(), self._lending.next_deadline()]
        deadlines += [prompt.ticket_by for prompt in self._roster]
        return Survey(
            (*self._batch.holders(), *self._lending.holders()),
            min((at for at in deadlines if at is not None), default=None),
        )

    def _admit(self, link: int, request: Request, now: float) -> None:
        known = self._roster.get(request.sequence_id)
        if known is not None:  # twice is as good as once, from the same router
            if known.link != link:
                conflict = RequestConflict("another router's request has this id")
                self._outbox.ended(link, failed(request.sequence_id, conflict))
            return
        prompt = Prompt(link, request, self._now_ns(), request.deadline(now), sequence=Sequence.of(request))
        error = self._roster.admit(prompt, self._blocks_for(len(request.prompt)))
        if error is not None:
            self._outbox.ended(link, failed(request.sequence_id, error))
            return
        expected = request.sampling.max_tokens == 1  # else it becomes so with its ticket
        self._batch.add(prompt.sequence, now, Goal.PROMPT, spare=0 if expected else self._largest)

    def _hand_over(self, link: int, sequence_id: SequenceId, ticket: Ticket, now: float) -> None:
        prompt = self._roster.get_of(link, sequence_id)
        if prompt is None:
            return  # ended meanwhile; the router releases the ticket
        try:
            self._lending.open(sequence_id, ticket, len(prompt.request.prompt))
        except BatonError as error:
            self._fail(prompt, error)
            return
        prompt.ticket_by = None
        self._batch.urge(prompt.sequence)
        self._announce(prompt, now)

    def _expire(self, now: float) -> None:
        self._end_loans(self._lending.poll(now))
        for prompt in self._roster.expired(now):
            self._fail(prompt, DeadlineExceeded("the request's deadline passed during prefill"))
        for prompt in [prompt for prompt in self._roster if prompt.ticket_by is not None and now >= prompt.ticket_by]:
            self._fail(prompt, LeaseExpired("no decode worker came for the prompt's KV in time"))

    def _started(self, prompt: Prompt) -> None:
        """It has blocks. Again, after it made room for another: nothing."""
        if prompt.started_ns:
            return
        prompt.started_ns = self._now_ns()
        self._roster.start(prompt)
        self._reporter.cached(prompt.sequence.cached_tokens)
        self._reporter.part(prompt, names.SPAN_QUEUE, prompt.arrived_ns, prompt.started_ns)

    def _first_tokens(self, result: StepResult, now: float) -> None:
        for sequence in give_tokens(self._outbox, self._roster, result.tokens):
            prompt = self._of(sequence)
            prompt.first_token = sequence.tokens[0]
            counts = (
                (names.GEN_AI_USAGE_INPUT, len(prompt.request.prompt)),
                (names.GEN_AI_USAGE_CACHED, sequence.cached_tokens),
                (names.STEPS, prompt.chunks),
            )
            self._reporter.part(prompt, names.SPAN_PREFILL, prompt.started_ns, self._now_ns(), counts)
            prompt.ticket_by = now + self._ticket_timeout_s
        for sequence, reason in result.ended:  # the answer is complete with its first token
            if isinstance(reason, BatonError):
                self._fail(self._of(sequence), reason)
            else:
                self._end(self._of(sequence), reason)

    def _announce(self, prompt: Prompt, now: float) -> None:
        """Offer what is complete, if there is a ticket; when that is all, only the loan holds blocks any more."""
        sequence, done = prompt.sequence, prompt.first_token is not None
        complete = len(sequence.blocks) if done else sequence.computed // self._block_tokens
        if self._lending.announce(prompt.sequence_id, sequence.blocks, complete, now, prompt.first_token):
            prompt.offered_ns = prompt.offered_ns or self._now_ns()
            if done:
                prompt.ticket_by = None
                self._batch.remove(sequence)

    def _end_loans(self, failed: list[LoanFailed]) -> None:
        for failure in failed:
            prompt = self._roster.get(failure.sequence_id)
            if prompt is not None:
                self._fail(prompt, failure.error)

    def _fail(self, prompt: Prompt, error: BatonError) -> None:
        # A reader's stale ticket is the router's to place again, not the client's to see.
        told = LeaseExpired(str(error)) if isinstance(error, StaleEpoch) else error
        self._end(prompt, EndReason.FAILED, told)

    def _end(self, prompt: Prompt, reason: EndReason, error: BatonError | None = None) -> None:
        """The one way out: every block is back, or stays with a loan whose bytes are still read."""
        self._roster.remove(prompt)
        self._lending.withdraw(prompt.sequence_id)
        self._batch.remove(prompt.sequence)
        ended = failed(prompt.sequence_id, error) if error else Ended(sequence_id=prompt.sequence_id, reason=reason)
        self._outbox.ended(prompt.link, ended)

    def _report_offer(self, prompt: Prompt, loan: Loan) -> None:
        attributes = transfer_attributes(loan.moved, loan.ticket.ticket_id)
        self._reporter.part(prompt, names.SPAN_OFFER, prompt.offered_ns, self._now_ns(), attributes)

    def _of(self, sequence: Sequence) -> Prompt:
        prompt = self._roster.get(sequence.sequence_id)
        assert prompt is not None, sequence.sequence_id
        return prompt

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)
