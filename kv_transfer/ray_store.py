"""Ray's object store: the way that always works.

Per piece ONE object, a numpy view of the gathered blocks (a torch tensor would be pickled both ways), and ONE actor
call to the reader's rank that carries the piece and the object's ref, nested in a list so that Ray doesn't resolve it.
The source keeps its ref until `withdraw`; the reader's copy of the ref keeps the bytes alive while it reads.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
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
from .encoding import encode
from .integrity import Bytes
from .messages import Delivery, Returned
from .pool import Blocks
from .ray_ranks import RayRanks, short
from .transport import Moved, moved, read, write_verified

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

    def offer(self, piece: Piece, blocks: Sequence[BlockId], reader: str) -> "Future[Moved]":
        return self._offers.submit(self._offer, piece, tuple(blocks), reader)

    def pull(self, delivery: Delivery, into: Sequence[BlockId]) -> "Future[Moved]":
        return self._pulls.submit(self._pull, delivery, tuple(into))

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
        piece, data = read(self._pool, piece, blocks, checked=self._checked)
        try:
            refs = [ray.put(data)] if blocks else []
            self._ranks.deliver(reader, encode(piece), refs, _ANNOUNCE_S)
        except (RayError, ValueError) as error:
            raise TransferFailed(f"the decode worker's rank did not take the KV: {short(error)}") from None
        with self._lock:
            self._kept.setdefault(piece.ticket_id, []).extend(refs)
        return moved(self.name, data.nbytes, len(blocks), start)

    def _pull(self, delivery: Delivery, into: tuple[BlockId, ...]) -> Moved:
        piece, start = delivery.message, time_ns()
        assert isinstance(piece, Piece)
        try:
            write_verified(self._pool, piece, self._fetch(delivery), into)
        except CorruptPiece:
            _log.warning("a piece of ticket %s arrived damaged, reading it again", piece.ticket_id)
            write_verified(self._pool, piece, self._fetch(delivery), into)
        return moved(self.name, len(into) * self._pool.block_bytes, len(into), start)

    def _fetch(self, delivery: Delivery) -> Bytes:
        if not delivery.handles:
            return np.empty((0, self._pool.block_bytes), dtype=np.uint8)
        try:
            ref: Any = delivery.handles[0]
            data: Bytes = ray.get(ref, timeout=_READ_S)
        except (RayError, TimeoutError) as error:
            raise TransferFailed(f"the KV could not be read from its source: {short(error)}") from None
        return data

    def _tell(self, inbox: str, message: Returned) -> None:
        try:
            # Not waited for: a peer that hangs would delay what others are told.
            self._ranks.deliver(inbox, encode(message), [], None)
        except (RayError, ValueError) as error:
            _log.info("rank %s was not told of ticket %s: %s", inbox, message.ticket_id, short(error))
