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
from ..core.ids import BlockId, TicketId
from ..core.tickets import Piece
from .integrity import Bytes
from .messages import Delivery, Message, Returned
from .pool import Blocks
from .transport import Moved, moved, read, write_verified

NAMESPACE = "baton"
"""Ranks are named actors of this Ray namespace; an actor's name is its inbox, its method `deliver` takes a message."""

_ANNOUNCE_S = 20.0
_READ_S = 30.0
_THREADS = 2

_log = logging.getLogger(__name__)


class RayStoreTransport:
    """See transport.py. Needs a process that is connected to Ray."""

    name = "ray_store"

    def __init__(self, pool: Blocks) -> None:
        self._pool = pool
        self._offers = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-offer")
        self._pulls = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-pull")
        self._tells = ThreadPoolExecutor(1, thread_name_prefix="kv-tell")
        self._actors: dict[str, Any] = {}
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
        piece, data = read(self._pool, piece, blocks)
        try:
            refs = [ray.put(data)] if blocks else []
            self._send(reader, piece, refs)
        except (RayError, ValueError) as error:
            raise TransferFailed(f"the decode worker's rank did not take the KV: {_short(error)}") from None
        with self._lock:
            self._kept.setdefault(piece.ticket_id, []).extend(refs)
        return moved(data.nbytes, len(blocks), start)

    def _pull(self, delivery: Delivery, into: tuple[BlockId, ...]) -> Moved:
        piece, start = delivery.message, time_ns()
        assert isinstance(piece, Piece)
        try:
            write_verified(self._pool, piece, self._fetch(delivery), into)
        except CorruptPiece:
            _log.warning("a piece of ticket %s arrived damaged, reading it again", piece.ticket_id)
            write_verified(self._pool, piece, self._fetch(delivery), into)
        return moved(len(into) * self._pool.block_bytes, len(into), start)

    def _fetch(self, delivery: Delivery) -> Bytes:
        if not delivery.handles:
            return np.empty((0, self._pool.block_bytes), dtype=np.uint8)
        try:
            ref: Any = delivery.handles[0]
            data: Bytes = ray.get(ref, timeout=_READ_S)
        except (RayError, TimeoutError) as error:
            raise TransferFailed(f"the KV could not be read from its source: {_short(error)}") from None
        return data

    def _tell(self, inbox: str, message: Returned) -> None:
        try:
            # Not waited for: a peer that hangs would delay what others are told.
            self._actor(inbox).deliver.remote(message, [])
        except (RayError, ValueError) as error:
            _log.info("rank %s was not told of ticket %s: %s", inbox, message.ticket_id, _short(error))

    def _send(self, inbox: str, message: Message, refs: list[Any]) -> None:
        """Raises RayError (the actor is gone, late, or its inbox full) or ValueError (no actor of that name)."""
        try:
            ray.get(self._actor(inbox).deliver.remote(message, refs), timeout=_ANNOUNCE_S)
        except RayError:
            with self._lock:
                self._actors.pop(inbox, None)  # gone, so its handle is of no more use: an inbox is one life's
            raise

    def _actor(self, inbox: str) -> Any:
        with self._lock:
            actor = self._actors.get(inbox)
        if actor is None:
            actor = ray.get_actor(inbox, namespace=NAMESPACE)
            with self._lock:
                self._actors[inbox] = actor
        return actor


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
