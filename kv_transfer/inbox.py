"""The bounded mailbox of a rank: other threads put, the step loop drains.

The loop sleeps on `wakeup` beside its ring's doorbell, so a message is seen within one step and nothing polls.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock

from ..core.errors import Overloaded, Unavailable
from .encoding import decode
from .messages import Delivery, Hello, PeerLost

DEFAULT_BOUND = 4096


class Wakeup:
    """An eventfd that any thread may ring and one loop sleeps on. Ringing twice is as good as once."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = Lock()
        self._closed = False

    def ring(self) -> None:
        with self._lock:  # a late pull may ring while the loop closes; the descriptor's number may be another's by then
            if not self._closed:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.fd)


class Inbox:
    """First in, first out. Thread-safe. Holds at most `bound` messages, and word of each lost peer."""

    def __init__(self, bound: int = DEFAULT_BOUND) -> None:
        self.wakeup = Wakeup()
        self.greeter: Callable[[bytes], bytes] | None = None  # the transport's answer to a handshake, once there is one
        self._bound = bound
        self._waiting: deque[Delivery] = deque()
        self._lock = Lock()

    def put(self, delivery: Delivery) -> None:
        """Raises Overloaded when full: the sender learns that nothing was taken."""
        with self._lock:
            if len(self._waiting) >= self._bound and not isinstance(delivery.message, PeerLost):
                raise Overloaded(f"the rank's inbox holds {self._bound} messages already")
            self._waiting.append(delivery)
        self.wakeup.ring()

    def drain(self) -> list[Delivery]:
        """Everything that is there, oldest first."""
        with self._lock:
            taken = list(self._waiting)
            self._waiting.clear()
        return taken


def deliver(inbox: Inbox, message: bytes, handles: Sequence[object]) -> None:
    """What a rank's actor does with one call of a peer, and all it does. Raises Overloaded when the inbox is full,
    Damaged for what is no whole message."""
    decoded = decode(message)
    if isinstance(decoded, Hello):
        return  # belongs on a stream
    inbox.put(Delivery(decoded, tuple(handles)))


def greet(inbox: Inbox, record: bytes) -> bytes:
    """What a rank's actor answers to a peer's handshake: see kv_transfer/capability.py. Raises Unavailable before the
    rank has loaded."""
    if inbox.greeter is None:
        raise Unavailable("the rank has not loaded its model yet")
    return inbox.greeter(record)
