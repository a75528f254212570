"""Ray's object store: the way that always works.

Per part of a piece ONE object, numpy arrays of its blocks (a torch tensor would be pickled both ways), and ONE actor
call to the reader's rank that carries the part and the object's ref, nested in a list so that Ray doesn't resolve it.
The source keeps its ref until `withdraw`; the reader's copy of the ref keeps the bytes alive while it reads.

Large blocks go from the pool into the store by themselves; small ones are gathered first, as each array costs time.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Lock, local
from time import time_ns
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import RayError

from ..core.errors import CorruptPiece, TransferFailed
from ..core.frames import Way
from ..core.ids import BlockId, TicketId
from ..core.tickets import Piece
from .copying import bad_positions, checksums_of, copy_rows, runs
from .encoding import encode
from .integrity import Bytes, checksums
from .messages import Delivery, Returned
from .pool import BlockPool, Blocks
from .ray_ranks import RayRanks, short
from .recut import Into, Recut, write_recut
from .transport import Moved, moved, parts, size_of

_PART_BYTES = 32 << 20  # the reader takes one while the next one is put
_LARGE = 1 << 18  # blocks from this size on go into the store without being gathered
_ANNOUNCE_S = 20.0
_READ_S = 30.0
_THREADS = 2

_log = logging.getLogger(__name__)


class RayStoreTransport:
    """See transport.py. Needs a process that is connected to Ray."""

    name = "ray_store"
    ways: Sequence[Way] = ()

    def __init__(self, pool: Blocks, *, ranks: RayRanks | None = None, checked: bool = True) -> None:
        """checked: what is offered gets checksums."""
        self._pool = pool
        self._ranks = RayRanks() if ranks is None else ranks
        self._checked = checked
        self._offers = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-offer")
        self._pulls = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-pull")
        self._tells = ThreadPoolExecutor(1, thread_name_prefix="kv-tell")
        self._kept: dict[TicketId, list[Any]] = {}
        self._lock = Lock()
        self._staged = local()

    def offer(self, piece: Piece, blocks: Sequence[BlockId], reader: str) -> "Future[Moved]":
        return self._offers.submit(self._offer, piece, tuple(blocks), reader)

    def pull(self, delivery: Delivery, into: Into) -> "Future[Moved]":
        return self._pulls.submit(self._pull, delivery, into)

    def withdraw(self, ticket_id: TicketId) -> None:
        with self._lock:
            self._kept.pop(ticket_id, None)

    def tell(self, inbox: str, message: Returned) -> None:
        self._tells.submit(self._tell, inbox, message)

    def living(self) -> int:
        with self._lock:
            return sum(len(refs) for refs in self._kept.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Waits for what is under way (bounded by the time-outs above), drops what has not begun."""
        for threads in (self._offers, self._pulls, self._tells):
            threads.shutdown(wait=True, cancel_futures=True)

    def _offer(self, piece: Piece, blocks: tuple[BlockId, ...], reader: str) -> Moved:
        start = time_ns()
        refs: list[Any] = []
        try:
            sent = []
            for part, named in parts(piece, blocks, _PART_BYTES // self._pool.block_bytes):
                about, arrays = self._read(part, named)
                put = [ray.put(arrays)] if named else []
                refs += put
                sent.append(self._ranks.send(reader, encode(about), put))
            self._ranks.wait(reader, sent, _ANNOUNCE_S)
        except (RayError, ValueError) as error:
            raise TransferFailed(f"the decode worker's rank did not take the KV: {short(error)}") from None
        with self._lock:
            self._kept.setdefault(piece.ticket_id, []).extend(refs)
        return moved(self.name, len(blocks) * self._pool.block_bytes, len(blocks), start)

    def _read(self, piece: Piece, blocks: Sequence[BlockId]) -> tuple[Piece, list[Bytes]]:
        """The blocks as arrays [n, B] u8, one after the other, and the piece with its checksums, if it has any."""
        host = self._pool.host if isinstance(self._pool, BlockPool) else None
        if host is None or self._pool.block_bytes < _LARGE:
            rows = self._pool.gather(blocks) if host is None else self._gather(host, blocks)
            arrays, sums = [rows], checksums(piece.ticket_id, piece.blocks, rows) if self._checked else ()
        else:
            arrays = [host[blocks[a] : blocks[a] + b - a] for a, b in runs(len(blocks), blocks)]
            sums = checksums_of(piece.ticket_id, piece.blocks, host, blocks) if self._checked else ()
        return replace(piece, checksums=sums), arrays

    def _gather(self, host: Bytes, blocks: Sequence[BlockId]) -> Bytes:
        """Into memory of this thread, which is warm and its own until the next one: fresh memory costs more to get than
        to fill."""
        stage: Bytes | None = getattr(self._staged, "memory", None)
        if stage is None or len(stage) < len(blocks):
            stage = self._staged.memory = np.empty((len(blocks), host.shape[1]), dtype=np.uint8)
        return np.take(host, blocks, axis=0, out=stage[: len(blocks)], mode="clip")

    def _pull(self, delivery: Delivery, into: Into) -> Moved:
        piece, start = delivery.message, time_ns()
        assert isinstance(piece, Piece)
        if isinstance(into, Recut):
            return moved(self.name, self._pull_recut(piece, delivery, into), size_of(into), start)
        bad = self._write(piece, self._fetch(delivery), into, range(len(into)))
        if bad:
            _log.warning("%d blocks of ticket %s arrived damaged, reading them again", len(bad), piece.ticket_id)
            bad = self._write(piece, self._fetch(delivery), into, bad)
        if bad:
            raise CorruptPiece(f"{len(bad)} of {len(into)} KV blocks arrived damaged (first: {piece.blocks[bad[0]]})")
        return moved(self.name, len(into) * self._pool.block_bytes, len(into), start)

    def _write(self, piece: Piece, arrays: Sequence[Bytes], into: Sequence[BlockId], at: Sequence[int]) -> list[int]:
        """The piece's blocks at these positions into our pool. Gives the positions of those that are bad."""
        if not _is_whole(piece, arrays):
            return list(at)
        host = self._pool.host if isinstance(self._pool, BlockPool) else None
        bad = []
        for positions, array in _placed(arrays):
            here = [i for i in at if i in positions]
            named, targets = [i - positions.start for i in here], [into[i] for i in here]
            if host is not None:
                bad += copy_rows(piece, here, array, named, host, targets)
            elif here:
                rows = array if len(here) == len(array) else array[named]
                bad += bad_positions(piece, here, rows)
                self._pool.scatter(targets, rows)
        return bad

    def _pull_recut(self, piece: Piece, delivery: Delivery, into: Recut) -> int:
        """Gives how many bytes were written. Raises CorruptPiece, and then none was."""
        arrays = self._fetch(delivery)
        bad = _bad_of(piece, arrays)
        if bad:
            _log.warning("%d blocks of ticket %s arrived damaged, reading them again", len(bad), piece.ticket_id)
            arrays = self._fetch(delivery)
            bad = _bad_of(piece, arrays)
        if bad:
            raise CorruptPiece(f"{len(bad)} KV blocks arrived damaged (first: {piece.blocks[bad[0]]})")
        return sum(write_recut(self._pool, piece, at, array, into) for at, array in _placed(arrays))

    def _fetch(self, delivery: Delivery) -> list[Bytes]:
        if not delivery.handles:
            return []
        try:
            ref: Any = delivery.handles[0]
            arrays: list[Bytes] = ray.get(ref, timeout=_READ_S)
        except (RayError, TimeoutError) as error:
            raise TransferFailed(f"the KV could not be read from its source: {short(error)}") from None
        return arrays

    def _tell(self, inbox: str, message: Returned) -> None:
        try:
            # Not waited for: a peer that hangs would delay what others are told.
            self._ranks.send(inbox, encode(message), [])
        except (RayError, ValueError) as error:
            _log.info("rank %s was not told of ticket %s: %s", inbox, message.ticket_id, short(error))


def _placed(arrays: Sequence[Bytes]) -> Iterator[tuple[range, Bytes]]:
    """Each with the positions of its blocks in the piece."""
    first = 0
    for array in arrays:
        yield range(first, first + len(array)), array
        first += len(array)


def _is_whole(piece: Piece, arrays: Sequence[Bytes]) -> bool:
    """As many blocks came as the piece has, and each has a checksum or none."""
    count = len(piece.blocks)
    return sum(map(len, arrays)) == count and len(piece.checksums) in (0, count)


def _bad_of(piece: Piece, arrays: Sequence[Bytes]) -> list[int]:
    """Positions of the piece's blocks that are not what it says; all of them where there are more or fewer."""
    if not _is_whole(piece, arrays):
        return list(range(len(piece.blocks)))
    return [i for at, array in _placed(arrays) for i in bad_positions(piece, at, array)]
