"""Where a hand-over lands: reserve blocks, pull pieces into them, commit or abort.

    reserve -> accept (pull), accept (pull), ... -> landed -> commit     the caller's blocks now
                        \\-> failed, expired, aborted                      blocks back

Fenced twice: a piece must name our epoch and a ticket that is open. Blocks that a pull still writes stay held until its
future is done, aborted or not.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..core.errors import BatonError, CorruptPiece, LeaseExpired, StaleEpoch, WorkerLost
from ..core.frames import Holder
from ..core.ids import BlockId, Epoch, SequenceId, TicketId
from ..core.tickets import Geometry, Piece, Ticket
from ..engine.ledger import Ledger
from ..kv_transfer.cuts import Cut, blocks_of, brought, completed, is_needed
from ..kv_transfer.messages import Delivery, Returned
from ..kv_transfer.plan import keeps_keys, require_bridged
from ..kv_transfer.recut import Into, Recut
from ..kv_transfer.transport import Moved, Transport
from .lending import Identity, as_baton_error


@dataclass(frozen=True, slots=True)
class _Pull:
    piece: Piece
    writes: tuple[int, ...]  # blocks of ours, by index in the prompt


@dataclass(slots=True)
class Reservation:
    ticket: Ticket
    sequence_id: SequenceId
    table: list[BlockId]  # all blocks of the sequence, prompt first; all held by the reservation
    deadline: float
    missing: set[int]
    prompt_tokens: int
    wanted: frozenset[int]
    source: Geometry | None = None  # of all pieces with blocks, once one has come
    asked: set[int] = field(default_factory=set)  # the source's blocks that a pull was started for, ...
    arrived: set[int] = field(default_factory=set)  # ... and has ended for; where their shape is not ours
    pulls: "dict[Future[Moved], _Pull]" = field(default_factory=dict)
    sources: dict[str, Epoch] = field(default_factory=dict)
    moved: list[Moved] = field(default_factory=list)
    first_token: int | None = None
    told: bool = False  # that it has landed

    @property
    def keeps_keys(self) -> bool:
        """What has landed is what our own blocks of its keys would hold: see `keeps_keys`."""
        return self.source is None or keeps_keys(self.source, self.ticket.geometry)

    @property
    def cut(self) -> Cut | None:
        """Of the prompt, where the pieces' shape is not ours."""
        if self.source is None or self.source == self.ticket.geometry:
            return None
        reader_block = self.ticket.geometry.block_tokens
        return Cut(prompt_tokens=self.prompt_tokens, source_block=self.source.block_tokens, reader_block=reader_block)


@dataclass(frozen=True, slots=True)
class Landed:
    """Every wanted block is here and verified: commit it."""

    reservation: Reservation
    first_token: int


@dataclass(frozen=True, slots=True)
class LandingFailed:
    """The reservation is aborted already."""

    sequence_id: SequenceId
    error: BatonError


@dataclass(slots=True)
class _Ending:
    """Blocks of an aborted reservation that pulls still write."""

    sequence_id: SequenceId
    blocks: list[BlockId]
    pulls: "list[Future[Moved]]"


class Landing:
    """Owns every reservation of a reader. Called by the step loop's thread alone."""

    def __init__(
        self,
        ledger: Ledger,
        transport: Transport,
        geometry: Geometry,
        identity: Identity,
        *,
        lease_s: float,
        timeout_s: float,
        wake: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._transport = transport
        self._geometry = geometry
        self._identity = identity
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._wake = wake
        self._open: dict[TicketId, Reservation] = {}
        self._ending: list[_Ending] = []

    def reserve(
        self,
        sequence_id: SequenceId,
        ticket_id: TicketId,
        table: list[BlockId],
        wanted: Sequence[int],
        prompt_tokens: int,
        now: float,
    ) -> Ticket:
        """Take over all of a sequence's blocks, held by the caller until now; ask for those of the `wanted` indices.

        Nobody else may hold or read the wanted ones: pulls write them.
        """
        assert ticket_id not in self._open, ticket_id
        ticket = Ticket(
            ticket_id=ticket_id,
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            wanted=tuple(wanted),
            geometry=self._geometry,
            lease_s=self._lease_s,
            inbox=self._identity.inbox,
        )
        self._open[ticket_id] = Reservation(
            ticket, sequence_id, list(table), now + self._timeout_s, set(wanted), prompt_tokens, frozenset(wanted)
        )
        return ticket

    def accept(self, delivery: Delivery, now: float) -> None:
        """Start pulling an announced piece. One that came before changes nothing.

        Raises StaleEpoch (another life's, or no open ticket), GeometryMismatch, CorruptPiece (blocks nobody asked for);
        the caller then refuses it.
        """
        piece = delivery.message
        assert isinstance(piece, Piece), piece
        reservation = self._of(piece)
        if reservation is None:
            raise StaleEpoch(f"ticket {piece.ticket_id} is not open in this life of the worker")
        require_bridged(piece.geometry, self._geometry)
        if reservation.source is None and piece.blocks:
            reservation.source = piece.geometry
        if not _fits(reservation, piece):
            raise CorruptPiece(f"a piece of ticket {piece.ticket_id} does not fit what was asked for")
        reservation.sources[piece.source_inbox] = piece.source_epoch
        if piece.last:
            reservation.first_token = piece.first_token
        if set(piece.blocks) <= reservation.asked:
            return
        reservation.asked.update(piece.blocks)
        reservation.deadline = now + self._timeout_s
        into, writes = _place(reservation, piece)
        pull = self._transport.pull(delivery, into)
        reservation.pulls[pull] = _Pull(piece, writes)
        pull.add_done_callback(lambda _: self._wake())

    def refuse(self, piece: Piece, error: BatonError) -> None:
        """Tell a piece's source to take its blocks back; ends our reservation too, if the ticket is one of ours."""
        reservation = self._of(piece)
        if reservation is not None:
            reservation.sources[piece.source_inbox] = piece.source_epoch
            self.abort(piece.ticket_id, error)
        else:
            self._tell(piece.source_inbox, piece.source_epoch, piece.ticket_id, piece.sequence_id, error)

    def poll(self, now: float) -> list[Landed | LandingFailed]:
        """What has happened since: each landed or failed reservation is named once."""
        self._ending = [ending for ending in self._ending if not self._finish(ending)]
        news: list[Landed | LandingFailed] = []
        for reservation in list(self._open.values()):
            error = self._settle(reservation)
            if error is None and now >= reservation.deadline and not reservation.told:
                error = LeaseExpired("the prompt's KV did not arrive in time")
            if error is not None:
                self.abort(reservation.ticket.ticket_id, error)
                news.append(LandingFailed(reservation.sequence_id, error))
            elif self._complete(reservation) and reservation.first_token is not None and not reservation.told:
                reservation.told = True
                news.append(Landed(reservation, reservation.first_token))
        return news

    def lost(self, inbox: str) -> list[LandingFailed]:
        """Nothing more comes from the source of this inbox: abort what still waits for it."""
        failed = []
        for reservation in [one for one in self._open.values() if inbox in one.sources and not one.told]:
            error = self._settle(reservation)
            if error is not None or not self._complete(reservation) or reservation.first_token is None:
                error = error or WorkerLost("the prefill worker ended while the prompt's KV was on its way")
                self.abort(reservation.ticket.ticket_id, error)
                failed.append(LandingFailed(reservation.sequence_id, error))
        return failed

    def commit(self, ticket_id: TicketId) -> list[BlockId]:
        """The sequence's blocks, held by the caller from now on; the source is told. Only for what has landed."""
        reservation = self._open.pop(ticket_id)
        assert self._complete(reservation), ticket_id
        self._tell_all(reservation, None)
        return reservation.table

    def abort(self, ticket_id: TicketId, error: BatonError) -> None:
        """Give the blocks back and tell the source why. An unknown ticket changes nothing."""
        reservation = self._open.pop(ticket_id, None)
        if reservation is None:
            return
        self._tell_all(reservation, error)
        busy = {future: pull for future, pull in reservation.pulls.items() if not (future.cancel() or future.done())}
        written = {reservation.table[index] for pull in busy.values() for index in pull.writes}
        self._ledger.release([block for block in reversed(reservation.table) if block not in written])
        if busy:
            self._ending.append(_Ending(reservation.sequence_id, sorted(written), list(busy)))

    def next_deadline(self) -> float | None:
        return min((reservation.deadline for reservation in self._open.values()), default=None)

    def holders(self) -> Iterable[Holder]:
        """Each reservation that holds blocks."""
        for reservation in self._open.values():
            yield Holder(sequence_id=reservation.sequence_id, state="reserved", block_ids=reservation.table)
        for ending in self._ending:
            yield Holder(sequence_id=ending.sequence_id, state="reserved, ending", block_ids=ending.blocks)

    def open_reservations(self) -> int:
        """Reservations that are not over, those among them that pulls still write."""
        return len(self._open) + len(self._ending)

    def _of(self, piece: Piece) -> Reservation | None:
        """What it is for: of this life, by its ticket and its sequence."""
        found = self._open.get(piece.ticket_id)
        if found is None or (piece.reader_epoch, piece.sequence_id) != (self._identity.epoch, found.sequence_id):
            return None
        return found

    @staticmethod
    def _complete(reservation: Reservation) -> bool:
        # A second pull of a block that is here already may still write it: pieces may overlap.
        return not reservation.missing and not reservation.pulls

    @staticmethod
    def _settle(reservation: Reservation) -> BatonError | None:
        """Take in finished pulls; the error of one that failed."""
        error: BatonError | None = None
        for future in [future for future in reservation.pulls if future.done()]:
            pull = reservation.pulls.pop(future)
            problem = future.exception()
            if problem is None:
                reservation.moved.append(future.result())
                _take_in(reservation, pull.piece)
            else:
                error = error or as_baton_error(problem)
        return error

    def _finish(self, ending: _Ending) -> bool:
        if not all(pull.done() for pull in ending.pulls):
            return False
        self._ledger.release(ending.blocks)
        return True

    def _tell_all(self, reservation: Reservation, error: BatonError | None) -> None:
        for inbox, epoch in reservation.sources.items():
            self._tell(inbox, epoch, reservation.ticket.ticket_id, reservation.sequence_id, error)

    def _tell(
        self, inbox: str, epoch: Epoch, ticket_id: TicketId, sequence_id: SequenceId, error: BatonError | None
    ) -> None:
        message = Returned(
            ticket_id=ticket_id,
            sequence_id=sequence_id,
            source_epoch=epoch,
            error_code=error.code if error else "",
            error_message=str(error) if error else "",
        )
        self._transport.tell(inbox, message)


def _fits(reservation: Reservation, piece: Piece) -> bool:
    """It brings what was asked for and nothing else, in one shape, and ends with a first token."""
    if piece.last and piece.first_token is None:
        return False
    if piece.blocks and piece.geometry != reservation.source:
        return False
    cut, wanted = reservation.cut, reservation.wanted
    if cut is None:
        return wanted.issuperset(piece.blocks)
    return all(is_needed(cut, wanted, index) for index in piece.blocks)


def _place(reservation: Reservation, piece: Piece) -> tuple[Into, tuple[int, ...]]:
    """Where a piece goes, and which of our blocks are written, by index in the prompt."""
    cut, table = reservation.cut, reservation.table
    if cut is None:
        return [table[index] for index in piece.blocks], piece.blocks
    tokens = brought(cut, reservation.wanted, piece.blocks)
    writes = tuple(sorted({block for run in tokens for block in blocks_of(run, cut.reader_block)}))
    return Recut(reservation.ticket.geometry, {index: table[index] for index in writes}, tokens), writes


def _take_in(reservation: Reservation, piece: Piece) -> None:
    """All of a piece is here."""
    cut = reservation.cut
    if cut is None:
        reservation.missing.difference_update(piece.blocks)
    else:
        reservation.missing.difference_update(completed(cut, reservation.wanted, reservation.arrived, piece.blocks))
        reservation.arrived.update(piece.blocks)
