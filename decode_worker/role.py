"""The policy of a decode worker.

    waiting -> reserved (ticket granted, pieces land) -> landed -> running (one token a step) -> ended

All growth is reserved up front, so a sequence that runs is never paused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from time import perf_counter, time_ns

from ..core.errors import BatonError, Cancelled, DeadlineExceeded, LeaseExpired, RequestConflict, StaleEpoch
from ..core.frames import Command, HandOver, Hello, Release, TicketGranted
from ..core.ids import SequenceId, TicketId
from ..core.request import Ended, EndReason, Load, Request, SequenceTokens
from ..core.tickets import Piece, Ticket
from ..engine.engine import Engine, StepToken
from ..engine.sequence import Sequence
from ..kv_transfer.messages import Delivery
from ..observe import names
from ..worker.landing import Landed, Landing, LandingFailed
from ..worker.loop import LinkClosed, RoleState, Survey
from ..worker.outbox import Outbox
from ..worker.reporting import Reporter, transfer_attributes
from ..worker.roster import Limits, Member, Roster, failed
from .scheduler import Waiting, plan_reservations, plan_step


@dataclass(slots=True)
class Answer(Member):
    """One sequence on a decode worker. Has a `sequence` from its reservation on."""

    sequence: Sequence | None = None
    ticket: Ticket | None = None  # while its blocks are the reservation's
    reserved_ns: int = 0
    first_piece_ns: int = 0  # 0: none came yet
    joined_ns: int = 0
    steps: int = 0


class DecodeRole:
    """See worker/loop.py's Role."""

    def __init__(
        self,
        engine: Engine,
        landing: Landing,
        outbox: Outbox,
        reporter: Reporter,
        limits: Limits,
        *,
        ticket_prefix: str,
        transport_name: str,
        now_ns: Callable[[], int] = time_ns,
    ) -> None:
        self._engine = engine
        self._landing = landing
        self._outbox = outbox
        self._reporter = reporter
        self._ticket_prefix = ticket_prefix
        self._transport_name = transport_name
        self._now_ns = now_ns
        self._numbers = count()
        self._roster: Roster[Answer] = Roster(limits)
        self._landed: dict[SequenceId, Answer] = {}
        self._running: dict[SequenceId, Answer] = {}

    # What others say

    def command(self, link: int, command: Command | LinkClosed, now: float) -> None:
        match command:
            case Request():
                self._admit(link, command, now)
            case Release(sequence_id=sequence_id):
                answer = self._roster.get_of(link, sequence_id)
                if answer is not None:
                    self._end(answer, EndReason.RELEASED)
            case LinkClosed():
                for answer in self._roster.of_link(link):
                    self._end(answer, EndReason.RELEASED)
            case Hello() | HandOver():
                return  # the service has answered the one; the other is for prefill workers

    def deliver(self, delivery: Delivery, now: float) -> None:
        piece = delivery.message
        if not isinstance(piece, Piece):
            return  # a return: nothing was lent here
        try:
            self._landing.accept(delivery, now)
        except BatonError as error:
            self._landing.refuse(piece, error)
            answer = self._roster.get(piece.sequence_id)
            if answer is not None and answer.ticket is not None and answer.ticket.ticket_id == piece.ticket_id:
                self._fail(answer, error)
            return
        answer = self._roster.get(piece.sequence_id)
        if answer is not None and not answer.first_piece_ns:
            answer.first_piece_ns = self._now_ns()
            self._reporter.part(answer, names.SPAN_RESERVE, answer.reserved_ns, answer.first_piece_ns)

    # One step

    def step(self, now: float) -> bool:
        self._expire_and_land(now)
        self._reserve(now)
        plan = plan_step(tuple(self._running), tuple(self._landed), self._engine.max_batch)
        for sequence_id in plan.join:
            self._running[sequence_id] = self._landed.pop(sequence_id)
        if not plan.run:
            return False
        begin = perf_counter()
        result = self._engine.step([], [sequence_of(self._running[sequence_id]) for sequence_id in plan.run])
        self._reporter.step(len(plan.run), perf_counter() - begin, len(result.tokens))
        for chosen in result.tokens:
            self._token(chosen)
        return True

    def state(self, *, drain: bool = False) -> RoleState:
        self._roster.draining |= drain
        ledger = self._engine.ledger
        load = Load(
            running=len(self._running),
            waiting=len(self._roster) - len(self._running),
            free_blocks=ledger.available,
            total_blocks=ledger.num_blocks,
            draining=self._roster.draining,
        )
        return RoleState(load, len(self._roster) + self._landing.open_reservations())

    def survey(self) -> Survey:
        held = [
            (answer.sequence_id, "running" if answer.sequence_id in self._running else "landed", answer.sequence.blocks)
            for answer in self._roster
            if answer.sequence is not None and answer.ticket is None
        ]
        deadlines = (self._roster.next_deadline(), self._landing.next_deadline())
        return Survey((*held, *self._landing.holders()), min((at for at in deadlines if at is not None), default=None))

    def _admit(self, link: int, request: Request, now: float) -> None:
        known = self._roster.get(request.sequence_id)
        if known is not None:
            if known.link != link:
                conflict = RequestConflict("another router's request has this id")
                self._outbox.ended(link, failed(request.sequence_id, conflict))
            elif known.ticket is not None:  # asking again gives the same ticket
                self._outbox.granted(link, TicketGranted(sequence_id=request.sequence_id, ticket=known.ticket))
            return
        deadline = None if request.timeout_s is None else now + request.timeout_s
        answer = Answer(link, request, self._now_ns(), deadline)
        error = self._roster.admit(answer, self._blocks_for(request))
        if error is not None:
            self._outbox.ended(link, failed(request.sequence_id, error))

    def _blocks_for(self, request: Request) -> int:
        # The last token of an answer is never computed, so its KV needs no place.
        return self._engine.blocks_for(len(request.prompt) + request.sampling.max_tokens - 1)

    def _expire_and_land(self, now: float) -> None:
        for answer in self._roster.expired(now):
            self._fail(answer, DeadlineExceeded("the request's deadline passed during decode"))
        for news in self._landing.poll(now):
            match news:
                case Landed():
                    self._land(news)
                case LandingFailed(sequence_id=sequence_id, error=error):
                    failing = self._roster.get(sequence_id)
                    if failing is not None:
                        self._fail(failing, error)

    def _land(self, news: Landed) -> None:
        answer = self._roster.get(news.reservation.sequence_id)
        assert answer is not None, news.reservation.sequence_id
        assert answer.ticket is not None, news.reservation.sequence_id
        sequence, ticket = sequence_of(answer), answer.ticket
        self._landing.commit(ticket.ticket_id)
        answer.ticket = None
        self._engine.commit(sequence, len(sequence.prompt))
        sequence.append(news.first_token)
        moved = news.reservation.moved
        attributes = transfer_attributes(moved, self._transport_name, ticket.ticket_id)
        answer.joined_ns = self._now_ns()
        self._reporter.part(answer, names.SPAN_TRANSFER, answer.first_piece_ns, answer.joined_ns, attributes)
        self._reporter.transferred(moved)
        reason = sequence.end_reason()
        if reason is not None:
            self._end(answer, reason)  # the source hands no complete answer over; one that does is taken at its word
        else:
            self._landed[answer.sequence_id] = answer

    def _reserve(self, now: float) -> None:
        if not self._roster.waiting:
            return
        waiting = (Waiting(key, self._blocks_for(answer.request)) for key, answer in self._roster.waiting.items())
        for key in plan_reservations(waiting, self._engine.ledger.available):
            answer = self._roster.waiting[key]
            request = answer.request
            sequence = answer.sequence = Sequence.of(request)
            hold_tokens = len(request.prompt) + request.sampling.max_tokens - 1
            cached = self._engine.start(sequence, hold_tokens, whole_prompt=True)
            wanted = range(self._engine.blocks_for(cached), self._engine.blocks_for(len(request.prompt)))
            ticket_id = TicketId(f"{self._ticket_prefix}-{next(self._numbers)}")
            answer.ticket = self._landing.reserve(key, ticket_id, sequence.blocks, wanted, now)
            answer.reserved_ns = self._now_ns()
            self._roster.start(answer)
            self._reporter.cached(cached)
            self._reporter.part(answer, names.SPAN_QUEUE, answer.arrived_ns, answer.reserved_ns)
            self._outbox.granted(answer.link, TicketGranted(sequence_id=key, ticket=answer.ticket))

    def _token(self, chosen: StepToken) -> None:
        sequence = chosen.sequence
        answer = self._running[sequence.sequence_id]
        answer.steps += 1
        tokens = SequenceTokens(
            sequence_id=sequence.sequence_id,
            first_position=len(sequence.tokens) - 1,
            token_ids=(chosen.token,),
            logprobs=() if chosen.logprobs is None else (chosen.logprobs,),
        )
        self._outbox.tokens(answer.link, tokens)
        reason = sequence.end_reason()
        if reason is not None:
            self._end(answer, reason)

    def _fail(self, answer: Answer, error: BatonError) -> None:
        # A source's stale piece is the router's to place again, not the client's to see.
        told = LeaseExpired(str(error)) if isinstance(error, StaleEpoch) else error
        self._end(answer, EndReason.FAILED, told)

    def _end(self, answer: Answer, reason: EndReason, error: BatonError | None = None) -> None:
        """The one way out: every block is back, or stays with the landing until its pull is done."""
        self._roster.remove(answer)
        self._landed.pop(answer.sequence_id, None)
        if self._running.pop(answer.sequence_id, None) is not None:
            counts = ((names.GEN_AI_USAGE_OUTPUT, answer.steps), (names.STEPS, answer.steps))
            self._reporter.part(answer, names.SPAN_DECODE, answer.joined_ns, self._now_ns(), counts)
        if answer.ticket is not None:
            sequence_of(answer).take_blocks()  # the reservation's, which gives them back
            self._landing.abort(answer.ticket.ticket_id, error or Cancelled("the request was released"))
        elif answer.sequence is not None:
            self._engine.finish(answer.sequence)
        ended = failed(answer.sequence_id, error) if error else Ended(sequence_id=answer.sequence_id, reason=reason)
        self._outbox.ended(answer.link, ended)


def sequence_of(answer: Answer) -> Sequence:
    assert answer.sequence is not None, answer.sequence_id
    return answer.sequence
