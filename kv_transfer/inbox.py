"""The bounded mailbox of a rank: other threads put, the step loop drains.

The loop sleeps on `wakeup` beside its ring's doorbell, so a message is seen within one step and nothing polls.
"""

import os
from collections import deque
from collections.abc import Sequence
from threading import Lock

from ..core.errors import Overloaded
from .messages import Delivery, Message

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
    """First in, first out. Thread-safe. Holds at most `bound` messages."""

    def __init__(self, bound: int = DEFAULT_BOUND) -> None:
        self.wakeup = Wakeup()
        self._bound = bound
        self._waiting: deque[Delivery] = deque()
        self._lock = Lock()

    def put(self, delivery: Delivery) -> None:
        """Raises Overloaded when full: the sender learns that nothing was taken."""
        with self._lock:
            if len(self._waiting) >= self._bound:
                raise Overloaded(f"the rank's inbox holds {self._bound} messages already")
            self._waiting.append(delivery)
        self.wakeup.ring()

    def drain(self) -> list[Delivery]:
        """Everything that is there, oldest first."""
        with self._lock:
            taken = list(self._waiting)
            self._waiting.clear()
        return taken


def deliver(inbox: Inbox, message: Message, handles: Sequence[object]) -> None:
    """What a rank's actor does with one call of a peer, and all it does. Raises Overloaded when the inbox is full."""
    inbox.put(Delivery(message, tuple(handles)))
