"""Blocks lent to readers: announced piece by piece, under a lease that only we count, from the last announcement on.

    open (ticket) -> announce, announce, ... last -> returned | withdrawn | expired -> blocks back

A loan is a holder of its blocks like any other, so they outlive the sequence that computed them. Blocks whose bytes the
transport still reads go back when it is done, whatever ended the loan.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..core.errors import BatonError, LeaseExpired, RequestConflict, TransferFailed, WorkerLost
from ..core.frames import Holder
from ..core.ids import BlockId, Epoch, SequenceId, WorkerId
from ..core.tickets import Geometry, Piece, Ticket
from ..engine.ledger import Ledger
from ..kv_transfer.cuts import Cut, next_source_parcel
from ..kv_transfer.messages import Returned
from ..kv_transfer.plan import Parcel, next_parcel, require_bridged
from ..kv_transfer.transport import Moved, Transport

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which life of which worker this rank is, and where its mail goes."""

    worker_id: WorkerId
    epoch: Epoch
    inbox: str


@dataclass(slots=True)
class Loan:
    ticket: Ticket
    sequence_id: SequenceId
    deadline: float | None = None  # once the last piece is offered; until then the sequence's own life bounds it
    cut: Cut | None = None  # where the reader's blocks have another size
    wanted: frozenset[int] = frozenset()  # the reader's blocks
    announced: set[int] = field(default_factory=set)  # our blocks, by index in the prompt
    announced_tokens: int = 0  # of the prompt: all before was announced, if it was wanted
    blocks: list[BlockId] = field(default_factory=list)  # held by this loan
    offers: "list[Future[Moved]]" = field(default_factory=list)
    moved: list[Moved] = field(default_factory=list)
    complete: bool = False  # the last piece is offered


@dataclass(frozen=True, slots=True)
class LoanFailed:
    """The reader will not get the rest; the loan is closed already."""

    sequence_id: SequenceId
    error: BatonError


class Lending:
    """Owns every loan of a source. Called by the step loop's thread alone."""

    def __init__(
        self,
        ledger: Ledger,
        transport: Transport,
        geometry: Geometry,
        identity: Identity,
        lease_s: float,
        wake: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._transport = transport
        self._geometry = geometry
        self._identity = identity
        self._lease_s = lease_s
        self._wake = wake
        self._loans: dict[SequenceId, Loan] = {}
        self._closing: list[Loan] = []

    def open(self, sequence_id: SequenceId, ticket: Ticket, prompt_tokens: int) -> None:
        """Take a reader's ticket for a prompt. The same one again changes nothing. Raises GeometryMismatch,
        RequestConflict."""
        loan = self._loans.get(sequence_id)
        if loan is not None:
            if loan.ticket.ticket_id != ticket.ticket_id:
                raise RequestConflict(f"sequence {sequence_id} is promised to another ticket already")
            return
        require_bridged(self._geometry, ticket.geometry)
        here, there = self._geometry.block_tokens, ticket.geometry.block_tokens
        cut = None if here == there else Cut(prompt_tokens=prompt_tokens, source_block=here, reader_block=there)
        self._loans[sequence_id] = Loan(ticket, sequence_id, cut=cut, wanted=frozenset(ticket.wanted))

    def announce(
        self, sequence_id: SequenceId, table: list[BlockId], complete: int, now: float, first_token: int | None = None
    ) -> bool:
        """Offer what the reader wants of the blocks below index `complete`; with a first token it is the last piece.

        `table` holds the prompt's blocks, by index; the caller holds them now. False: there is no loan, or nothing new
        to say.
        """
        loan = self._loans.get(sequence_id)
        if loan is None or loan.complete:
            return False
        parcel = _next_parcel(loan, table, complete, whole=first_token is not None)
        if not parcel.indices and first_token is None:
            return False
        self._ledger.hold(parcel.blocks)
        loan.blocks += parcel.blocks
        loan.announced.update(parcel.indices)
        if first_token is not None:
            loan.complete = True
            self._renew(loan, now)
        piece = Piece(
            ticket_id=loan.ticket.ticket_id,
            sequence_id=sequence_id,
            reader_epoch=loan.ticket.epoch,
            source=self._identity.worker_id,
            source_epoch=self._identity.epoch,
            source_inbox=self._identity.inbox,
            blocks=parcel.indices,
            checksums=(),  # the transport fills them in as it reads the bytes
            geometry=self._geometry,
            last=loan.complete,
            first_token=first_token,
        )
        offer = self._transport.offer(piece, parcel.blocks, loan.ticket.inbox)
        loan.offers.append(offer)
        offer.add_done_callback(lambda _: self._wake())
        return True

    def returned(self, message: Returned) -> Loan | None:
        """The reader has committed or refused; gives the loan that ends by it, or None for one that is not ours now."""
        loan = self._loans.get(message.sequence_id)
        if loan is None or loan.ticket.ticket_id != message.ticket_id or message.source_epoch != self._identity.epoch:
            return None
        self.withdraw(message.sequence_id)
        return loan

    def lost(self, inbox: str) -> list[LoanFailed]:
        """The reader of this inbox is gone: end its loans."""
        lost = [loan.sequence_id for loan in self._loans.values() if loan.ticket.inbox == inbox]
        for sequence_id in lost:
            self.withdraw(sequence_id)
        error = WorkerLost("the decode worker ended before it had taken the KV")
        return [LoanFailed(sequence_id, error) for sequence_id in lost]

    def withdraw(self, sequence_id: SequenceId) -> None:
        """End a loan now. Blocks that the transport still reads go back at a later `poll`."""
        loan = self._loans.pop(sequence_id, None)
        if loan is None:
            return
        for offer in loan.offers:
            offer.cancel()
        if not self._finish(loan):
            self._closing.append(loan)

    def poll(self, now: float) -> list[LoanFailed]:
        """Move what has happened since: offers that failed and leases that ended close their loans."""
        self._closing = [loan for loan in self._closing if not self._finish(loan)]
        failed: list[LoanFailed] = []
        for loan in list(self._loans.values()):
            under_way = len(loan.offers)
            error = self._settle(loan)
            if loan.complete and len(loan.offers) < under_way:
                self._renew(loan, now)  # the reader has heard of it only now
            if error is None and loan.deadline is not None and now >= loan.deadline:
                error = LeaseExpired("the decode worker did not take the KV in time")
            if error is not None:
                self.withdraw(loan.sequence_id)
                failed.append(LoanFailed(loan.sequence_id, error))
        return failed

    def next_deadline(self) -> float | None:
        return min((loan.deadline for loan in self._loans.values() if loan.deadline is not None), default=None)

    def holders(self) -> Iterable[Holder]:
        """Each loan that holds blocks."""
        for state, loans in (("lent", list(self._loans.values())), ("lent, ending", self._closing)):
            for loan in loans:
                if loan.blocks:
                    yield Holder(sequence_id=loan.sequence_id, state=state, block_ids=loan.blocks)

    def lent_blocks(self) -> int:
        """Blocks that loans hold, each counted once."""
        return len({block for loan in (*self._loans.values(), *self._closing) for block in loan.blocks})

    def open_loans(self) -> int:
        """Loans that are not over, those among them whose bytes are still read."""
        return len(self._loans) + len(self._closing)

    def _renew(self, loan: Loan, now: float) -> None:
        loan.deadline = now + min(loan.ticket.lease_s, self._lease_s)

    @staticmethod
    def _settle(loan: Loan) -> BatonError | None:
        """Move finished offers to `moved`; the first error of one that failed."""
        error: BatonError | None = None
        for offer in [offer for offer in loan.offers if offer.done()]:
            loan.offers.remove(offer)
            if offer.cancelled():
                continue
            problem = offer.exception()
            if problem is None:
                loan.moved.append(offer.result())
            elif error is None:
                error = as_baton_error(problem)
        return error

    def _finish(self, loan: Loan) -> bool:
        """Give the blocks of an ended loan back if nothing reads them any more."""
        self._settle(loan)
        if loan.offers:
            return False
        self._transport.withdraw(loan.ticket.ticket_id)
        self._ledger.release(reversed(loan.blocks))
        loan.blocks = []
        return True


def _next_parcel(loan: Loan, table: list[BlockId], complete: int, *, whole: bool) -> Parcel:
    """whole: all of the prompt is computed."""
    cut = loan.cut
    if cut is None:
        return next_parcel(loan.wanted, loan.announced, table, complete)
    computed = cut.prompt_tokens if whole else min(complete * cut.source_block, cut.prompt_tokens)
    parcel = next_source_parcel(cut, loan.wanted, table, loan.announced_tokens, computed)
    loan.announced_tokens = max(computed, loan.announced_tokens)
    return parcel


def as_baton_error(problem: BaseException) -> BatonError:
    """What a transport's future failed with, fit for a client."""
    if isinstance(problem, BatonError):
        return problem
    _log.error("a transfer failed unexpectedly", exc_info=problem)
    return TransferFailed("the KV could not be moved between the workers")
