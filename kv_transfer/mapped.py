"""Ranks of one host: the reader maps the source's pool once and copies its blocks straight into its own.

    source                                          reader
    record            -- handshake, over Ray -->    maps pool and generation words, probes
                      <-- answer, token --------
    stream, Hello     ------------------------->    knows whose stream it is, maps for as long as it is open
                      <------------------- Hello    has mapped
    piece: blocks, generations, checksums ----->    generations same? copy, check, generations still the same?
                      <-------------- Returned      source alive?

Nothing is kept for what is offered: the loan keeps the blocks, and a block that has a new holder all the same has a new
generation. A closed stream is a peer's end, for both sides: each tells its rank (`PeerLost`), and the reader lets go of
the source's memory. A later stream of the same inbox is another `Source`, another `Reader`.
"""

import hmac
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from time import monotonic, time_ns
from types import TracebackType
from typing import Self

import numpy as np

from ..core.errors import CorruptPiece, LeaseExpired, Overloaded, TransferFailed
from ..core.frames import Way
from ..core.ids import BlockId, TicketId
from ..core.segment import RankLost
from ..core.tickets import Piece
from .capability import Answer, Capability, Site, answer_from_bytes, capability_from_bytes, to_bytes, why_not_mapped
from .copying import checksums_of
from .encoding import Damaged, Wire
from .integrity import checksums
from .mapping import Mapping, fence
from .messages import Delivery, Hello, PeerLost, Returned
from .pool import BlockPool
from .recut import Into, Recut
from .streams import Stream, Streams
from .transport import Moved, moved, parts, size_of

Greet = Callable[[str, bytes], bytes]
"""Carries a record to the rank of an inbox and brings its answer. Raises TransferFailed."""

_THREADS = 2
_WELCOME_S = 3.0  # for a reader to map, once it has our Hello; much less than a lease
_EXPECTED_S = 10.0  # for a source to connect, once it has our answer
_MOST_EXPECTED = 64
_PART_BYTES = 8 << 20  # announced together: the reader copies them while the next ones' checksums are made

_log = logging.getLogger(__name__)


class NotMapped(TransferFailed):
    """The reader does not map our pool. `lasting`: and won't, for as long as both live."""

    def __init__(self, reason: str, *, lasting: bool) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(eq=False, slots=True)
class Source:
    """A peer whose pool is mapped here; what its stream brought names it."""

    record: Capability
    stream: Stream
    mapping: Mapping | None  # None: it is gone
    gb_per_s: float
    stale_reads: int = 0


@dataclass(eq=False, slots=True)
class Reader:
    """A peer that maps our pool, or is about to: then its stream is open, and it has not said so yet."""

    record: Capability
    token: bytes  # of its answer
    gb_per_s: float
    mapped: "Future[Stream]" = field(default_factory=Future)  # its stream; fails with NotMapped


@dataclass(frozen=True, slots=True)
class _Expected:
    """A source that has our answer and will connect."""

    token: bytes
    record: Capability
    gb_per_s: float
    until: float


class MappedTransport:
    """See transport.py. Of a site whose pools can be mapped."""

    name = "mapped"

    def __init__(
        self,
        site: Site,
        greet: Greet,
        lost: Callable[[str, bool], None] = lambda *_: None,
        returned: Callable[[str, Returned], None] = lambda *_: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """greet: reaches other ranks. lost: told of each reader whose stream has closed, and whether it left in good
        order. returned: told what each says beside the inbox."""
        assert site.generations is not None, "pools that can't be mapped"
        self._site = site
        self._capability = site.capability
        self._greet = greet
        self._lost = lost
        self._returned = returned
        self._clock = clock
        self._readers: dict[str, Reader] = {}  # that have mapped
        self._sources: dict[str, Source] = {}
        self._expected: dict[str, _Expected] = {}  # by inbox, the longest expected first
        self._announced: dict[TicketId, int] = {}
        self._lock = Lock()
        site.generations.begin(site.epoch)
        self._offers = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-offer")
        self._pulls = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-pull")
        self._streams = Streams(site.socket, self._heard, self._closed)

    def offer(self, piece: Piece, blocks: Sequence[BlockId], reader: str) -> "Future[Moved]":
        return self._offers.submit(self._offer, piece, tuple(blocks), reader)

    def pull(self, delivery: Delivery, into: Into) -> "Future[Moved]":
        return self._pulls.submit(self._pull, delivery, into)

    def withdraw(self, ticket_id: TicketId) -> None:
        with self._lock:
            self._announced.pop(ticket_id, None)

    def tell(self, inbox: str, message: Returned) -> None:
        self.told(inbox, message)

    def living(self) -> int:
        with self._lock:
            return sum(self._announced.values())

    @property
    def ways(self) -> Sequence[Way]:
        with self._lock:
            readers = [
                Way(peer=peer, transport=self.name, probed_gb_per_s=one.gb_per_s) for peer, one in self._readers.items()
            ]
            sources = [
                Way(
                    peer=one.record.inbox,
                    transport=self.name,
                    probed_gb_per_s=one.gb_per_s,
                    stale_reads=one.stale_reads,
                )
                for one in self._sources.values()
            ]
        return (*readers, *sources)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Drops what has not begun and waits for what is under way."""
        assert self._site.generations is not None
        self._streams.close()
        for threads in (self._offers, self._pulls):
            threads.shutdown(wait=True, cancel_futures=True)
        self._site.generations.begin(0)

    # Beside the protocol, for who chooses between transports

    def told(self, inbox: str, message: Returned) -> bool:
        """False: no source of that inbox has a stream here, or its stream does not take it."""
        with self._lock:
            source = self._sources.get(inbox)
        if source is None:
            return False
        try:
            source.stream.send(message)
        except (TransferFailed, Damaged) as error:
            _log.info("rank %s was not told of ticket %s on its stream: %s", inbox, message.ticket_id, error)
            return False
        return True

    def is_met(self, reader: str) -> bool:
        """The stream to that reader is open, and it has mapped."""
        return self._stream_to(reader) is not None

    def meet(self, reader: str) -> Stream:
        """The stream to a reader; shakes hands first where there is none, which may take seconds. For one thread at a
        time, of each reader. Raises NotMapped."""
        known = self._stream_to(reader)
        if known is not None:
            return known
        answer = self._ask(reader)
        try:
            found = Reader(answer.record, bytes.fromhex(answer.token), answer.gb_per_s)
            stream = self._streams.connect(answer.record.socket, Hello(found.token), found)
        except (OSError, ValueError, TransferFailed, Damaged) as error:
            raise NotMapped(f"its stream can't be reached: {error}", lasting=False) from None
        try:
            found.mapped.result(_WELCOME_S)
        except TimeoutError:
            if found.mapped.cancel():
                stream.end()
                raise NotMapped(f"it has not mapped our pool within {_WELCOME_S:.0f} s", lasting=False) from None
        _log.info("%s maps our KV pool, %.1f GB/s", answer.record.worker_id, answer.gb_per_s)
        return stream

    def answer(self, record: bytes) -> bytes:
        """A source's handshake: see `Inbox.greeter`. Raises Damaged."""
        source = capability_from_bytes(record)
        refusal = why_not_mapped(source, self._capability)
        if refusal:
            return to_bytes(Answer(record=self._capability, refusal=refusal, lasting=True))
        try:
            gb_per_s = Mapping(source).probe()
        except (RankLost, OSError, ValueError) as error:
            return to_bytes(Answer(record=self._capability, refusal=f"its pool can't be mapped: {error}"))
        token = secrets.token_bytes(16)
        with self._lock:  # it is mapped again when its stream is here: one that dies before then holds no memory
            self._expected.pop(source.inbox, None)
            self._expected[source.inbox] = _Expected(token, source, gb_per_s, self._clock() + _EXPECTED_S)
            self._forget_late()
        return to_bytes(Answer(record=self._capability, token=token.hex(), gb_per_s=gb_per_s))

    # Source

    def _stream_to(self, reader: str) -> Stream | None:
        with self._lock:
            known = self._readers.get(reader)
        if known is None:
            return None
        stream = known.mapped.result()
        return stream if stream.is_open else None

    def _ask(self, reader: str) -> Answer:
        try:
            answer = answer_from_bytes(self._greet(reader, to_bytes(self._capability)))
        except (TransferFailed, Damaged) as error:
            raise NotMapped(f"no handshake: {error}", lasting=False) from None
        if answer.refusal:
            raise NotMapped(answer.refusal, lasting=answer.lasting)
        return answer

    def _offer(self, piece: Piece, blocks: tuple[BlockId, ...], reader: str) -> Moved:
        assert self._site.generations is not None
        start = time_ns()
        stream = self._stream_to(reader)
        if stream is None:
            raise TransferFailed(f"no stream to {reader} is open")
        # They stand as long as the loan does: any later holder has others.
        generations = self._site.generations.of(blocks)
        self._count(piece.ticket_id, 1)  # before the first part is sent: it may come back before the last one is
        try:
            self._send(stream, piece, blocks, generations)
        except BaseException:
            self._count(piece.ticket_id, -1)
            raise
        return moved(self.name, len(blocks) * self._site.pool.block_bytes, len(blocks), start)

    def _send(self, stream: Stream, piece: Piece, blocks: tuple[BlockId, ...], generations: tuple[int, ...]) -> None:
        """In parts. Raises TransferFailed."""
        done = 0
        for part, named in parts(piece, blocks, _PART_BYTES // self._site.pool.block_bytes):
            stream.send(
                replace(
                    part,
                    source_blocks=tuple(named),
                    generations=generations[done : done + len(named)],
                    checksums=self._checksums(part, named),
                )
            )
            done += len(named)

    def _count(self, ticket_id: TicketId, more: int) -> None:
        with self._lock:
            count = self._announced.pop(ticket_id, 0) + more
            if count > 0:
                self._announced[ticket_id] = count

    def _checksums(self, piece: Piece, blocks: Sequence[BlockId]) -> tuple[int, ...]:
        if not self._site.checked:
            return ()
        pool = self._site.pool
        host = pool.host if isinstance(pool, BlockPool) else None
        if host is not None:
            return checksums_of(piece.ticket_id, piece.blocks, host, blocks)
        return checksums(piece.ticket_id, piece.blocks, pool.gather(blocks))

    # Reader

    def _pull(self, delivery: Delivery, into: Into) -> Moved:
        piece, start = delivery.message, time_ns()
        source = delivery.handles[0]
        assert isinstance(piece, Piece)
        assert isinstance(source, Source)
        mapping = source.mapping
        if mapping is None:
            raise TransferFailed(f"the source {piece.source} is gone")
        if not mapping.fits(piece, len(piece.blocks) if isinstance(into, Recut) else len(into)):
            raise CorruptPiece(f"a piece of ticket {piece.ticket_id} names blocks that its source does not have")
        self._check(source, mapping, piece)
        if isinstance(into, Recut):
            num_bytes, bad = mapping.recut(piece, into, self._site.pool)
        else:
            num_bytes, bad = self._copy(mapping, piece, into)
        self._check(source, mapping, piece)
        if bad:
            count, first = len(piece.blocks), piece.blocks[min(bad)]
            raise CorruptPiece(f"{len(bad)} of {count} KV blocks arrived damaged (first: {first})")
        return moved(self.name, num_bytes, size_of(into), start)

    def _copy(self, mapping: Mapping, piece: Piece, into: Sequence[BlockId]) -> tuple[int, list[int]]:
        """Gives how many bytes, and the positions of blocks that do not have their checksums."""
        bad = mapping.copy(piece, into, self._site.pool, range(len(into)))
        if bad:
            _log.warning("%d blocks of ticket %s arrived damaged, copying them again", len(bad), piece.ticket_id)
            bad = mapping.copy(piece, into, self._site.pool, sorted(bad))
        return len(into) * self._site.pool.block_bytes, bad

    def _check(self, source: Source, mapping: Mapping, piece: Piece) -> None:
        """Before the copy and after it. Raises LeaseExpired, TransferFailed."""
        fence()
        named = np.array(piece.source_blocks, dtype=np.int64)
        stale = mapping.generations(named) != np.array(piece.generations, dtype=np.uint64)
        if stale.any():
            with self._lock:
                source.stale_reads += 1
            _log.warning("%s gave blocks of ticket %s to others while they were read", piece.source, piece.ticket_id)
            raise LeaseExpired(
                f"the prefill worker took {int(stale.sum())} of {len(named)} KV blocks back before they were read"
            )
        # The memory of the dead reads like that of the living.
        if not (source.stream.is_open and mapping.is_of_its_epoch()):
            raise TransferFailed(f"the source {piece.source} ended while its KV was read")

    # The streams' thread

    def _was_announced(self, ticket_id: TicketId) -> bool:
        with self._lock:
            return ticket_id in self._announced

    def _heard(self, stream: Stream, message: Wire) -> bool:
        match message, stream.owner:
            case Hello(token), None:
                self._welcome(stream, token)
                return True
            case Piece(), Source() as source if self._is_of(message, source):
                return self._put(Delivery(message, (source,)))
            case Hello(token), Reader() as reader if not reader.mapped.done() and token == reader.token:
                self._has_mapped(reader, stream)
                return True
            case Returned(), Reader() as reader if reader.mapped.done():
                if self._was_announced(message.ticket_id):
                    self._returned(reader.record.inbox, message)
                return self._put(Delivery(message))
            case _:
                raise Damaged(f"a {type(message).__name__} has no place on this stream")

    @staticmethod
    def _is_of(piece: Piece, source: Source) -> bool:
        record = source.record
        said = (piece.source, piece.source_epoch, piece.source_inbox, piece.geometry)
        return said == (record.worker_id, record.epoch, record.inbox, record.geometry)

    def _put(self, delivery: Delivery) -> bool:
        try:
            self._site.inbox.put(delivery)
        except Overloaded:
            return False
        return True

    def _welcome(self, stream: Stream, token: bytes) -> None:
        """Raises Damaged where nobody with this token is expected."""
        with self._lock:
            self._forget_late()
            found = [one for one in self._expected.values() if hmac.compare_digest(one.token, token)]
            expected = self._expected.pop(found[0].record.inbox) if found else None
        if expected is None:
            raise Damaged("a stream of nobody who was expected")
        inbox = expected.record.inbox
        try:
            source = Source(expected.record, stream, Mapping(expected.record), expected.gb_per_s)
        except (RankLost, OSError, ValueError) as error:
            raise Damaged(f"the pool of {expected.record.worker_id} can't be mapped: {error}") from None
        with self._lock:
            earlier = self._sources.pop(inbox, None)
            self._sources[inbox] = source
            stream.owner = source
        if earlier is not None:
            self._lose(earlier)
        with suppress(TransferFailed):  # it has closed: `_closed` is told next
            stream.send(Hello(token))
        _log.info("the KV pool of %s is mapped, %.1f GB/s", expected.record.worker_id, expected.gb_per_s)

    def _forget_late(self) -> None:
        """Under the lock: who has not come in time, and the longest expected of too many."""
        for inbox, one in list(self._expected.items()):
            if one.until <= self._clock() or len(self._expected) > _MOST_EXPECTED:
                del self._expected[inbox]

    def _has_mapped(self, reader: Reader, stream: Stream) -> None:
        """Raises Damaged where nobody waits for that any more."""
        if not reader.mapped.set_running_or_notify_cancel():
            raise Damaged("a reader has mapped too late")
        inbox = reader.record.inbox
        with self._lock:
            earlier = self._readers.pop(inbox, None)
        if earlier is not None:  # the end of its stream is still to be told
            self._lose_reader(earlier)
        with self._lock:
            reader.mapped.set_result(stream)
            self._readers[inbox] = reader

    def _lose_reader(self, reader: Reader) -> None:
        """What it was promised it does not read any more."""
        self._lost(reader.record.inbox, not Path(reader.record.socket).exists())  # see `Streams.close`
        self._put(Delivery(PeerLost(reader.record.inbox)))

    def _lose(self, source: Source) -> None:
        source.mapping = None  # a pull under way still has it
        source.stream.end()
        self._put(Delivery(PeerLost(source.record.inbox)))

    def _closed(self, stream: Stream) -> None:
        match stream.owner:
            case Source() as source:
                with self._lock:
                    known = self._sources.get(source.record.inbox) is source
                    if known:
                        del self._sources[source.record.inbox]
                if known:
                    self._lose(source)
            case Reader() as reader if not reader.mapped.done():  # nothing was promised on this stream
                if reader.mapped.set_running_or_notify_cancel():
                    reason = "its stream closed before it had mapped our pool"
                    reader.mapped.set_exception(NotMapped(reason, lasting=False))
            case Reader() as reader:
                inbox = reader.record.inbox
                with self._lock:
                    known = self._readers.get(inbox) is reader
                    if known:
                        del self._readers[inbox]
                if known:  # else a later stream of its inbox has taken its place
                    self._lose_reader(reader)
            case _:
                return
