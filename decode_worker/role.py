"""The policy of a decode worker.

    waiting -> reserved (ticket granted, pieces land) -> ready -> running (one token a step) -> ended
                                                                    | ^
                                                 blocks are short:  v |  preempted, then computed here or swapped in

A sequence is given blocks for its prompt, and one more whenever it fills the last: so it may be put back for a while.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from time import perf_counter, time_ns

from ..core.errors import BatonError, Cancelled, DeadlineExceeded, LeaseExpired, StaleEpoch
from ..core.frames import Command, HandOver, Hello, Release, TicketGranted
from ..core.ids import TicketId
from ..core.request import EndReason, Request
from ..core.tickets import Piece, Ticket
from ..engine.continuous_batch import ContinuousBatch
from ..engine.engine import Engine
from ..engine.members import Goal
from ..kv_transfer.messages import Delivery, PeerLost
from ..observe import names
from ..worker.answering import Answer, Answering
from ..worker.landing import Landed, Landing, LandingFailed
from ..worker.loop import LinkClosed, RoleState, Survey
from ..worker.outbox import Outbox
from ..worker.reporting import Reporter, transfer_attributes
from ..worker.roster import Limits


@dataclass(slots=True, kw_only=True)
class LandingAnswer(Answer):
    """One sequence on a decode worker."""

    ticket: Ticket | None = None  # while its blocks are the reservation's
    first_piece_ns: int = 0  # 0: none came yet


class DecodeRole:
    """See worker/loop.py's Role."""

    def __init__(
        self,
        engine: Engine,
        batch: ContinuousBatch,
        landing: Landing,
        outbox: Outbox,
        reporter: Reporter,
        limits: Limits,
        *,
        ticket_prefix: str,
        now_ns: Callable[[], int] = time_ns,
    ) -> None:
        self._answers: Answering[LandingAnswer] = Answering(engine, batch, outbox, reporter, limits, now_ns)
        self._batch = batch
        self._block_tokens = engine.geometry.block_tokens
        self._landing = landing
        self._outbox = outbox
        self._reporter = reporter
        self._ticket_prefix = ticket_prefix
        self._now_ns = now_ns
        self._numbers = count()

    # What others say

    def command(self, link: int, command: Command | LinkClosed, now: float) -> None:
        match command:
            case Request():
                self._admit(link, command, now)
            case Release(sequence_id=sequence_id):
                answer = self._answers.roster.get_of(link, sequence_id)
                if answer is not None:
                    self._end(answer, EndReason.RELEASED)
            case LinkClosed():
                for answer in self._answers.roster.of_link(link):
                    self._end(answer, EndReason.RELEASED)
            case Hello() | HandOver():
                return  # the service has answered the one; the other is for prefill workers

    def deliver(self, delivery: Delivery, now: float) -> None:
        piece = delivery.message
        if isinstance(piece, PeerLost):
            self._end_landings(self._landing.lost(piece.inbox))
            return
        if not isinstance(piece, Piece):
            return  # a return: nothing was lent here
        try:
            self._landing.accept(delivery, now)
        except BatonError as error:
            self._landing.refuse(piece, error)
            answer = self._answers.roster.get(piece.sequence_id)
            if answer is not None and answer.ticket is not None and answer.ticket.ticket_id == piece.ticket_id:
                self._fail(answer, error)
            return
        answer = self._answers.roster.get(piece.sequence_id)
        if answer is not None and not answer.first_piece_ns:
            answer.first_piece_ns = self._now_ns()
            self._reporter.part(answer, names.SPAN_RESERVE, answer.started_ns, answer.first_piece_ns)

    # One step

    def step(self, now: float) -> bool:
        self._expire_and_land(now)
        begin = perf_counter()
        result = self._batch.step(now)
        if result is None:
            return False
        for sequence in result.started:
            self._started(self._answers.of(sequence), now)
        self._answers.take(result, perf_counter() - begin)
        return True

    def state(self, *, drain: bool = False) -> RoleState:
        self._answers.roster.draining |= drain
        remaining = len(self._answers.roster) + self._landing.open_reservations()
        return RoleState(self._answers.load(), remaining)

    def lent_blocks(self) -> int:
        return 0

    def survey(self) -> Survey:
        deadlines = (self._answers.roster.next_deadline(), self._landing.next_deadline())
        return Survey(
            (*self._batch.holders(), *self._landing.holders()),
            min((at for at in deadlines if at is not None), default=None),
        )

    def _admit(self, link: int, request: Request, now: float) -> None:
        if self._answers.is_new(link, request):
            self._answers.admit(LandingAnswer.of(link, request, self._now_ns(), now), Goal.LANDING, now)
            return
        known = self._answers.roster.get_of(link, request.sequence_id)
        if known is not None and known.ticket is not None:  # asking again gives the same ticket
            self._outbox.granted(link, TicketGranted(sequence_id=request.sequence_id, ticket=known.ticket))

    def _expire_and_land(self, now: float) -> None:
        for answer in self._answers.roster.expired(now):
            self._fail(answer, DeadlineExceeded("the request's deadline passed during decode"))
        for news in self._landing.poll(now):
            match news:
                case Landed():
                    self._land(news)
                case LandingFailed():
                    self._end_landings([news])

    def _land(self, news: Landed) -> None:
        answer = self._answers.roster.get(news.reservation.sequence_id)
        assert answer is not None, news.reservation.sequence_id
        assert answer.ticket is not None, news.reservation.sequence_id
        ticket, sequence = answer.ticket, answer.sequence
        self._landing.commit(ticket.ticket_id)
        answer.ticket = None
        self._batch.landed(sequence, news.first_token, exact=news.reservation.keeps_keys)
        moved = news.reservation.moved
        attributes = transfer_attributes(moved, ticket.ticket_id)
        answer.decoding_ns = self._now_ns()
        self._reporter.part(answer, names.SPAN_TRANSFER, answer.first_piece_ns, answer.decoding_ns, attributes)
        self._reporter.transferred(moved)
        reason = sequence.end_reason()
        if reason is not None:
            self._end(answer, reason)  # the source hands no complete answer over; one that does is taken at its word

    def _started(self, answer: LandingAnswer, now: float) -> None:
        """Blocks are there: for what is to land, or again for what was preempted."""
        sequence = answer.sequence
        self._answers.started(answer)
        if sequence.tokens:
            return
        # What is known of the prompt is in blocks that others hold too; nobody may write these.
        known = -(-sequence.computed // self._block_tokens)
        ticket_id = TicketId(f"{self._ticket_prefix}-{next(self._numbers)}")
        wanted = range(known, len(sequence.blocks))
        prompt_tokens = len(sequence.prompt)
        answer.ticket = self._landing.reserve(
            answer.sequence_id, ticket_id, sequence.blocks, wanted, prompt_tokens, now
        )
        self._outbox.granted(answer.link, TicketGranted(sequence_id=answer.sequence_id, ticket=answer.ticket))

    def _end_landings(self, failed: list[LandingFailed]) -> None:
        for failure in failed:
            answer = self._answers.roster.get(failure.sequence_id)
            if answer is not None:
                self._fail(answer, failure.error)

    def _fail(self, answer: LandingAnswer, error: BatonError) -> None:
        # A source's stale piece is the router's to place again, not the client's to see.
        told = LeaseExpired(str(error)) if isinstance(error, StaleEpoch) else error
        self._end(answer, EndReason.FAILED, told)

    def _end(self, answer: LandingAnswer, reason: EndReason, error: BatonError | None = None) -> None:
        """The one way out: every block is back, or stays with the landing until its pull is done."""
        if answer.ticket is not None:
            answer.sequence.take_blocks()  # the reservation's, which gives them back
            self._landing.abort(answer.ticket.ticket_id, error or Cancelled("the request was released"))
        self._answers.end(answer, reason, error)
