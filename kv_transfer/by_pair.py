r"""Each pair of workers moves KV the fastest way that it can: the source's pool mapped, else Ray's object store.

    unmet -> handshake -> mapped <-> object store, for a while      a stream that closed, copies that failed
                      \-> object store                              the two can't; or "no answer", for a while

The source chooses, at its first offer to a reader; the reader takes what comes. Offers go by the store while hands are
shaken. A way that is pinned by configuration is never left: then offers do wait for their own reader's
handshake, and where the way can't be had, offers and pulls fail with GeometryMismatch and say why.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from types import TracebackType
from typing import Self

from ..core.errors import ConfigError, GeometryMismatch, TransferFailed
from ..core.frames import Way
from ..core.ids import BlockId, TicketId
from ..core.tickets import Piece
from .capability import MAPPED, RAY_STORE, Answer, Site, capability_from_bytes, to_bytes, why_not_mapped
from .mapped import Greet, MappedTransport, NotMapped, Source
from .messages import Delivery, Returned
from .ray_ranks import RayRanks
from .ray_store import RayStoreTransport
from .recut import Into
from .transport import Moved, Transport

_AGAIN_S = 30.0  # in the store after something went wrong, before the mapped way is tried again
_FAULTS = ("CorruptPiece", "TransferFailed")  # of a reader's, that speak against the way and not the request
_MOST_WAYS = 256  # that are remembered, beside those that are mapped or under way

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pair:
    """What a source knows of one reader."""

    mapped: bool = False
    reason: str = ""  # why it is not
    until: float | None = None  # when to try again; None: never, while not mapped
    met: bool = False
    choosing: "Future[None] | None" = None  # its handshake, while it is under way

    def settled(self, now: float) -> bool:
        return self.met and (self.mapped or self.until is None or now < self.until)


class PairTransport:
    """See transport.py."""

    def __init__(
        self,
        site: Site,
        store: Transport,
        greet: Greet,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Raises ConfigError where the mapped way is pinned and this worker can't have it."""
        if site.transport == MAPPED and site.unmapped:
            raise ConfigError(f"--transport is mapped, but can't be: {site.unmapped}")
        self.name = site.transport
        self._site = site
        self._store = store
        self._clock = clock
        possible = site.transport != RAY_STORE and not site.unmapped
        self._mapped = MappedTransport(site, greet, self._closed, self._returned, clock) if possible else None
        self._pairs: dict[str, _Pair] = {}  # by reader, the longest unused first
        self._sources: dict[str, Way] = {}  # whose pieces came through the store
        self._choices = ThreadPoolExecutor(2, thread_name_prefix="kv-choose")
        self._lock = Lock()
        site.inbox.greeter = self._answer

    def offer(self, piece: Piece, blocks: Sequence[BlockId], reader: str) -> "Future[Moved]":
        pair = self._pair(reader)
        if self._mapped is None:
            return self._store.offer(piece, blocks, reader)
        choosing = self._choosing(pair, reader)
        if choosing is not None and self._site.transport == MAPPED:
            return self._offer_after(choosing, pair, piece, blocks, reader)
        if pair.mapped:
            return self._offer_mapped(piece, blocks, reader)
        if self._site.transport == MAPPED:
            refused: Future[Moved] = Future()
            refused.set_exception(_refusal(pair))
            return refused
        return self._store.offer(piece, blocks, reader)

    def pull(self, delivery: Delivery, into: Into) -> "Future[Moved]":
        if delivery.handles and isinstance(delivery.handles[0], Source):
            assert self._mapped is not None
            with self._lock:  # what came before they had met says nothing any more
                self._sources.pop(delivery.handles[0].record.inbox, None)
            return self._mapped.pull(delivery, into)
        piece = delivery.message
        assert isinstance(piece, Piece)
        self._came_by_store(piece.source_inbox)
        if self._site.transport == MAPPED:
            refused: Future[Moved] = Future()
            refused.set_exception(GeometryMismatch(f"--transport is mapped here, but not at {piece.source}"))
            return refused
        return self._store.pull(delivery, into)

    def withdraw(self, ticket_id: TicketId) -> None:
        if self._mapped is not None:
            self._mapped.withdraw(ticket_id)
        self._store.withdraw(ticket_id)

    def tell(self, inbox: str, message: Returned) -> None:
        if self._mapped is None or not self._mapped.told(inbox, message):
            self._store.tell(inbox, message)

    def living(self) -> int:
        return self._store.living() + (self._mapped.living() if self._mapped is not None else 0)

    @property
    def ways(self) -> Sequence[Way]:
        mapped = [] if self._mapped is None else list(self._mapped.ways)
        with self._lock:
            stored = [
                Way(peer=reader, transport="" if self._site.transport == MAPPED else RAY_STORE, reason=pair.reason)
                for reader, pair in self._pairs.items()
                if pair.met and not pair.mapped
            ]
            known = {way.peer for way in (*mapped, *stored)}
            stored += [way for peer, way in self._sources.items() if peer not in known]
        slow = {way.peer for way in stored}
        return (*(way for way in mapped if way.peer not in slow), *stored)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._site.inbox.greeter = None
        self._choices.shutdown(wait=True, cancel_futures=True)
        if self._mapped is not None:
            self._mapped.__exit__(kind, error, at)

    def _pair(self, reader: str) -> _Pair:
        with self._lock:
            known = self._pairs.pop(reader, None)
            if known is not None:
                self._pairs[reader] = known
                return known
            if self._mapped is None:
                reason = self._site.unmapped or f"this worker is pinned to {RAY_STORE}"
                pair = self._pairs[reader] = _Pair(reason=reason, met=True)
            else:
                pair = self._pairs[reader] = _Pair()
            idle = [name for name, one in self._pairs.items() if one.met and not (one.mapped or one.choosing)]
            for name in idle[:-_MOST_WAYS]:
                del self._pairs[name]
        if pair.reason and self._site.transport != RAY_STORE:
            _log.warning("KV for %s moves by %s: %s", reader, RAY_STORE, pair.reason)
        return pair

    def _choosing(self, pair: _Pair, reader: str) -> "Future[None] | None":
        """The pair's handshake, begun if it is time for one. None: none is under way."""
        with self._lock:
            if pair.choosing is None and not pair.settled(self._clock()):
                pair.choosing = self._choices.submit(self._choose, pair, reader)
            return pair.choosing

    def _choose(self, pair: _Pair, reader: str) -> None:
        assert self._mapped is not None
        told, refusal = pair.reason if pair.met else None, None
        try:
            self._mapped.meet(reader)
        except NotMapped as error:
            refusal = error
        except Exception as error:  # whatever it is, the pair has to move
            _log.exception("the handshake with %s failed", reader)
            refusal = NotMapped(f"the handshake failed: {error!r}", lasting=False)
        with self._lock:
            pair.met, pair.mapped, pair.choosing = True, refusal is None, None
            pair.reason, pair.until = "", None
            if refusal is not None:
                pair.reason = str(refusal)
                pair.until = None if refusal.lasting else self._clock() + self._patience
        if refusal is None and not self._mapped.is_met(reader):
            self._fault(reader, "its stream has closed")  # before it could be told of a pair that was mapped
        elif refusal is not None and pair.reason != told:  # once for each pair, and again when it is another reason
            way = "cannot move" if self._site.transport == MAPPED else f"moves by {RAY_STORE}"
            _log.warning("KV for %s %s: %s", reader, way, pair.reason)
        elif refusal is None:
            _log.info("KV for %s moves by %s%s", reader, MAPPED, " again" if told else "")

    def _offer_mapped(self, piece: Piece, blocks: Sequence[BlockId], reader: str) -> "Future[Moved]":
        assert self._mapped is not None
        offered = self._mapped.offer(piece, blocks, reader)
        offered.add_done_callback(lambda ended: self._offered(reader, ended))
        return offered

    def _offer_after(
        self, choosing: "Future[None]", pair: _Pair, piece: Piece, blocks: Sequence[BlockId], reader: str
    ) -> "Future[Moved]":
        """Pinned to the mapped way: when its handshake is over. No thread waits for that."""
        result: Future[Moved] = Future()

        def go_on(chosen: "Future[None]") -> None:
            if chosen.cancelled():
                result.cancel()
            elif not result.set_running_or_notify_cancel():
                return  # the loan has ended
            elif pair.mapped:
                self._offer_mapped(piece, blocks, reader).add_done_callback(lambda ended: _hand_on(ended, result))
            else:
                result.set_exception(_refusal(pair))

        choosing.add_done_callback(go_on)
        return result

    @property
    def _patience(self) -> float:
        return 0.0 if self._site.transport == MAPPED else _AGAIN_S

    def _step_down(self, reader: str, reason: str) -> bool:
        """False: it was down already."""
        with self._lock:
            pair = self._pairs.get(reader)
            if pair is None or not pair.mapped:
                return False
            pair.mapped, pair.reason, pair.until = False, reason, self._clock() + self._patience
        return True

    def _fault(self, reader: str, reason: str) -> None:
        if self._step_down(reader, reason):
            _log.warning("KV for %s does not move by %s for a while: %s", reader, MAPPED, reason)

    def _offered(self, reader: str, ended: "Future[Moved]") -> None:
        error = None if ended.cancelled() else ended.exception()
        if isinstance(error, TransferFailed):
            self._fault(reader, str(error))

    def _closed(self, reader: str, in_good_order: bool) -> None:
        """Of the streams' thread: a reader's has closed."""
        if self._step_down(reader, "its stream has closed"):
            level = logging.INFO if in_good_order else logging.WARNING
            said = "it has left" if in_good_order else f"if it lives, its KV moves by {RAY_STORE} for a while"
            _log.log(level, "the stream to %s has closed; %s", reader, said)

    def _returned(self, reader: str, message: Returned) -> None:
        """Of the streams' thread: what a reader says of a piece that it mapped."""
        if message.error_code in _FAULTS:
            self._fault(reader, message.error_message or message.error_code)

    def _came_by_store(self, source: str) -> None:
        with self._lock:
            if source not in self._sources:
                self._sources[source] = Way(peer=source, transport=RAY_STORE, reason="the source chose it")
                while len(self._sources) > _MOST_WAYS:
                    self._sources.pop(next(iter(self._sources)))

    def _answer(self, record: bytes) -> bytes:
        """See `Inbox.greeter`."""
        if self._mapped is not None:
            answer = self._mapped.answer(record)
        else:
            mine = self._site.capability
            reason = why_not_mapped(capability_from_bytes(record), mine)
            answer = to_bytes(Answer(record=mine, refusal=reason, lasting=True))
        return answer


def _refusal(pair: _Pair) -> Exception:
    """Of an offer that is pinned to the mapped way."""
    if pair.until is None:
        return GeometryMismatch(f"--transport is mapped, but it can't be: {pair.reason}")
    return TransferFailed(f"--transport is mapped, but it can't be now: {pair.reason}")


def _hand_on(ended: "Future[Moved]", to: "Future[Moved]") -> None:
    error = CancelledError() if ended.cancelled() else ended.exception()
    if error is not None:
        to.set_exception(error)
    else:
        to.set_result(ended.result())


@contextmanager
def ray_transport(site: Site) -> Iterator[PairTransport]:
    """What a rank uses. Needs a process that is connected to Ray. Raises ConfigError as `PairTransport` does."""
    ranks = RayRanks()
    with (
        RayStoreTransport(site.pool, ranks=ranks, checked=site.checked) as store,
        PairTransport(site, store, ranks.greet) as transport,
    ):
        yield transport
