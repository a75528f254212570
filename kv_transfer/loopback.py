"""Same process: the reference transport. Ranks meet in a Hub; offered bytes are a copy that the Hub keeps."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from itertools import count
from threading import Lock
from time import time_ns

from ..core.errors import CorruptPiece, Overloaded, TransferFailed
from ..core.frames import Way
from ..core.ids import BlockId, TicketId
from ..core.tickets import Piece
from .encoding import encode
from .inbox import Inbox, deliver
from .integrity import Bytes
from .messages import Delivery, Message, Returned
from .pool import Blocks
from .recut import Into
from .transport import Moved, moved, read, size_of, write_verified


class Hub:
    """Inboxes by name, and the bytes that sources offer. Thread-safe."""

    def __init__(self) -> None:
        self._inboxes: dict[str, Inbox] = {}
        self._objects: dict[int, Bytes] = {}
        self._numbers = count()
        self._lock = Lock()

    def join(self, name: str, inbox: Inbox) -> None:
        with self._lock:
            self._inboxes[name] = inbox

    def leave(self, name: str) -> None:
        with self._lock:
            self._inboxes.pop(name, None)

    def send(self, name: str, message: Message, handles: Sequence[object] = ()) -> None:
        """Raises TransferFailed when nobody of that name takes it."""
        with self._lock:
            inbox = self._inboxes.get(name)
        if inbox is None:
            raise TransferFailed(f"no rank has the inbox {name!r}")
        try:
            deliver(inbox, encode(message), handles)
        except Overloaded as full:
            raise TransferFailed(str(full)) from full

    def keep(self, data: Bytes) -> int:
        with self._lock:
            number = next(self._numbers)
            self._objects[number] = data
            return number

    def drop(self, number: int) -> None:
        with self._lock:
            self._objects.pop(number, None)

    def fetch(self, number: object) -> Bytes:
        with self._lock:
            data = self._objects.get(number) if isinstance(number, int) else None
        if data is None:
            raise TransferFailed("the source has taken the KV back")
        return data


class LoopbackTransport:
    """See transport.py. `executor` runs the copies: threads for a service, a hand-cranked one for tests."""

    name = "loopback"
    ways: Sequence[Way] = ()

    def __init__(self, hub: Hub, pool: Blocks, executor: Executor) -> None:
        self._hub = hub
        self._pool = pool
        self._executor = executor
        self._kept: dict[TicketId, list[int]] = {}
        self._lock = Lock()

    def offer(self, piece: Piece, blocks: Sequence[BlockId], reader: str) -> "Future[Moved]":
        return self._executor.submit(self._offer, piece, tuple(blocks), reader)

    def pull(self, delivery: Delivery, into: Into) -> "Future[Moved]":
        return self._executor.submit(self._pull, delivery, into)

    def withdraw(self, ticket_id: TicketId) -> None:
        with self._lock:
            numbers = self._kept.pop(ticket_id, [])
        for number in numbers:
            self._hub.drop(number)

    def tell(self, inbox: str, message: Returned) -> None:
        try:
            self._hub.send(inbox, message)
        except TransferFailed:
            return  # the source's lease ends without us

    def living(self) -> int:
        with self._lock:
            return sum(len(numbers) for numbers in self._kept.values())

    def _offer(self, piece: Piece, blocks: tuple[BlockId, ...], reader: str) -> Moved:
        start = time_ns()
        piece, data = read(self._pool, piece, blocks)
        number = self._hub.keep(data)
        try:
            self._hub.send(reader, piece, (number,))
        except TransferFailed:
            self._hub.drop(number)
            raise
        with self._lock:
            self._kept.setdefault(piece.ticket_id, []).append(number)
        return moved(self.name, data.nbytes, len(blocks), start)

    def _pull(self, delivery: Delivery, into: Into) -> Moved:
        piece, start = delivery.message, time_ns()
        assert isinstance(piece, Piece)
        try:
            num_bytes = write_verified(self._pool, piece, self._hub.fetch(delivery.handles[0]), into)
        except CorruptPiece:
            num_bytes = write_verified(self._pool, piece, self._hub.fetch(delivery.handles[0]), into)
        return moved(self.name, num_bytes, size_of(into), start)
