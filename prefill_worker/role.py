"""The policy of a prefill worker.

waiting -> running (chunks) -> first token -> lent until the reader has committed -> ended
                                    \\-> ended: the answer is complete with it
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, time_ns

from ..core.errors import BatonError, DeadlineExceeded, LeaseExpired, RequestConflict, StaleEpoch, from_code
from ..core.frames import Command, HandOver, Hello, Release
from ..core.ids import SequenceId
from ..core.request import Ended, EndReason, Load, Request, SequenceTokens
from ..core.tickets import Ticket
from ..engine.engine import Engine, StepResult
from ..engine.sequence import Sequence
from ..kv_transfer.messages import Delivery, Returned
from ..observe import names
from ..worker.lending import Lending, Loan
from ..worker.loop import LinkClosed, RoleState, Survey
from ..worker.outbox import Outbox
from ..worker.reporting import Reporter, transfer_attributes
from ..worker.roster import Limits, Member, Roster, failed
from .scheduler import Running, Waiting, plan_starts, plan_step


@dataclass(slots=True)
class Prompt(Member):
    """One sequence on a prefill worker. Has a `sequence` from its start on."""

    expected: bool = False  # it has a ticket, or needs none
    sequence: Sequence | None = None
    cached_tokens: int = 0
    started_ns: int = 0
    chunks: int = 0
    first_token: int | None = None
    offered_ns: int = 0  # 0: nothing was announced
    ticket_by: float | None = None  # when computed and nobody has come for the KV


class PrefillRole:
    """See worker/loop.py's Role."""

    def __init__(
        self,
        engine: Engine,
        lending: Lending,
        outbox: Outbox,
        reporter: Reporter,
        limits: Limits,
        *,
        step_tokens: int,
        ticket_timeout_s: float,
        transport_name: str,
        now_ns: Callable[[], int] = time_ns,
    ) -> None:
        self._engine = engine
        self._largest = engine.blocks_for(limits.max_model_len)
        self._lending = lending
        self._outbox = outbox
        self._reporter = reporter
        self._step_tokens = step_tokens
        self._ticket_timeout_s = ticket_timeout_s
        self._transport_name = transport_name
        self._now_ns = now_ns
        self._roster: Roster[Prompt] = Roster(limits)
        self._running: dict[SequenceId, Prompt] = {}

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
        self._start()
        plan = plan_step(
            [Running(key, sequence_of(prompt).remaining) for key, prompt in self._running.items()], self._step_tokens
        )
        if not plan.chunks:
            return False
        begin = perf_counter()
        prompts = [self._running[sequence_id] for sequence_id, _ in plan.chunks]
        result = self._engine.step(
            [(sequence_of(prompt), count) for prompt, (_, count) in zip(prompts, plan.chunks, strict=True)], []
        )
        self._reporter.step(len(prompts), perf_counter() - begin, len(result.tokens), result.stats.prefill_tokens)
        for prompt in prompts:
            prompt.chunks += 1
        self._first_tokens(result, now)
        for prompt in prompts:
            if prompt.sequence_id in self._running:
                self._announce(prompt, now)
        return True

    def state(self, *, drain: bool = False) -> RoleState:
        self._roster.draining |= drain
        ledger, waiting = self._engine.ledger, self._roster.waiting
        tokens = sum(len(prompt.request.prompt) for prompt in waiting.values())
        tokens += sum(sequence_of(prompt).remaining for prompt in self._running.values())
        load = Load(
            running=len(self._running),
            waiting=len(waiting),
            waiting_tokens=tokens,
            free_blocks=ledger.available,
            total_blocks=ledger.num_blocks,
            draining=self._roster.draining,
        )
        return RoleState(load, len(self._roster) + self._lending.open_loans())

    def survey(self) -> Survey:
        held = [
            (prompt.sequence_id, "prefilling" if prompt.first_token is None else "computed", prompt.sequence.blocks)
            for prompt in self._roster
            if prompt.sequence is not None and prompt.sequence.blocks
        ]
        deadlines = [self._roster.next_deadline(), self._lending.next_deadline()]
        deadlines += [prompt.ticket_by for prompt in self._roster]
        return Survey((*held, *self._lending.holders()), min((at for at in deadlines if at is not None), default=None))

    def _admit(self, link: int, request: Request, now: float) -> None:
        known = self._roster.get(request.sequence_id)
        if known is not None:  # twice is as good as once, from the same router
            if known.link != link:
                conflict = RequestConflict("another router's request has this id")
                self._outbox.ended(link, failed(request.sequence_id, conflict))
            return
        deadline = None if request.timeout_s is None else now + request.timeout_s
        prompt = Prompt(link, request, self._now_ns(), deadline, expected=request.sampling.max_tokens == 1)
        error = self._roster.admit(prompt, self._engine.blocks_for(len(request.prompt)))
        if error is not None:
            self._outbox.ended(link, failed(request.sequence_id, error))

    def _hand_over(self, link: int, sequence_id: SequenceId, ticket: Ticket, now: float) -> None:
        prompt = self._roster.get_of(link, sequence_id)
        if prompt is None:
            return  # ended meanwhile; the router releases the ticket
        try:
            self._lending.open(sequence_id, ticket)
        except BatonError as error:
            self._fail(prompt, error)
            return
        prompt.expected, prompt.ticket_by = True, None
        self._announce(prompt, now)

    def _expire(self, now: float) -> None:
        for failure in self._lending.poll(now):
            prompt = self._roster.get(failure.sequence_id)
            if prompt is not None:
                self._fail(prompt, failure.error)
        for prompt in self._roster.expired(now):
            self._fail(prompt, DeadlineExceeded("the request's deadline passed during prefill"))
        for prompt in [prompt for prompt in self._roster if prompt.ticket_by is not None and now >= prompt.ticket_by]:
            self._fail(prompt, LeaseExpired("no decode worker came for the prompt's KV in time"))

    def _start(self) -> None:
        if not self._roster.waiting:
            return
        waiting = (
            Waiting(key, self._engine.blocks_for(len(prompt.request.prompt)), prompt.expected)
            for expected in (True, False)  # lazily: many may wait, few begin
            for key, prompt in self._roster.waiting.items()
            if prompt.expected is expected
        )
        available, max_batch = self._engine.ledger.available, self._engine.max_batch
        for key in plan_starts(waiting, len(self._running), available, max_batch, self._largest):
            prompt = self._roster.waiting[key]
            prompt.sequence = Sequence.of(prompt.request)
            prompt.cached_tokens = self._engine.start(prompt.sequence, len(prompt.request.prompt))
            prompt.started_ns = self._now_ns()
            self._roster.start(prompt)
            self._running[key] = prompt
            self._reporter.cached(prompt.cached_tokens)
            self._reporter.part(prompt, names.SPAN_QUEUE, prompt.arrived_ns, prompt.started_ns)

    def _first_tokens(self, result: StepResult, now: float) -> None:
        for chosen in result.tokens:
            prompt = self._running[chosen.sequence.sequence_id]
            prompt.first_token = chosen.token
            tokens = SequenceTokens(
                sequence_id=prompt.sequence_id,
                first_position=0,
                token_ids=(chosen.token,),
                logprobs=() if chosen.logprobs is None else (chosen.logprobs,),
                cached_tokens=prompt.cached_tokens,
            )
            self._outbox.tokens(prompt.link, tokens)
            counts = (
                (names.GEN_AI_USAGE_INPUT, len(prompt.request.prompt)),
                (names.GEN_AI_USAGE_CACHED, prompt.cached_tokens),
                (names.STEPS, prompt.chunks),
            )
            self._reporter.part(prompt, names.SPAN_PREFILL, prompt.started_ns, self._now_ns(), counts)
            reason = chosen.sequence.end_reason()
            if reason is not None:
                self._end(prompt, reason)
            else:
                prompt.ticket_by = now + self._ticket_timeout_s

    def _announce(self, prompt: Prompt, now: float) -> None:
        """Offer what is complete, if there is a ticket; when that is all, only the loan holds blocks any more."""
        sequence = prompt.sequence
        if sequence is None:
            return
        done = prompt.first_token is not None
        complete = len(sequence.blocks) if done else sequence.computed // self._engine.geometry.block_tokens
        if self._lending.announce(prompt.sequence_id, sequence.blocks, complete, now, prompt.first_token):
            prompt.offered_ns = prompt.offered_ns or self._now_ns()
            if done:
                prompt.ticket_by = None
                self._engine.finish(sequence)
        if done:
            self._running.pop(prompt.sequence_id, None)

    def _fail(self, prompt: Prompt, error: BatonError) -> None:
        # A reader's stale ticket is the router's to place again, not the client's to see.
        told = LeaseExpired(str(error)) if isinstance(error, StaleEpoch) else error
        self._end(prompt, EndReason.FAILED, told)

    def _end(self, prompt: Prompt, reason: EndReason, error: BatonError | None = None) -> None:
        """The one way out: every block is back, or stays with a loan whose bytes are still read."""
        self._roster.remove(prompt)
        self._running.pop(prompt.sequence_id, None)
        self._lending.withdraw(prompt.sequence_id)
        if prompt.sequence is not None:
            self._engine.finish(prompt.sequence)
        ended = failed(prompt.sequence_id, error) if error else Ended(sequence_id=prompt.sequence_id, reason=reason)
        self._outbox.ended(prompt.link, ended)

    def _report_offer(self, prompt: Prompt, loan: Loan) -> None:
        attributes = transfer_attributes(loan.moved, self._transport_name, loan.ticket.ticket_id)
        self._reporter.part(prompt, names.SPAN_OFFER, prompt.offered_ns, self._now_ns(), attributes)


def sequence_of(prompt: Prompt) -> Sequence:
    assert prompt.sequence is not None, prompt.sequence_id
    return prompt.sequence
