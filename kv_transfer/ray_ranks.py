"""Other workers' ranks, as Ray reaches them: named actors of one namespace, an actor's name is its inbox."""

from threading import Lock
from typing import Any

import ray
from ray.exceptions import RayError

from ..core.errors import TransferFailed

NAMESPACE = "baton"
"""An actor's method `deliver` takes a message, as bytes, and `greet` answers a handshake: see kv_transfer/inbox.py."""

_GREET_S = 3.0  # much less than a lease


class RayRanks:
    """Thread-safe. Needs a process that is connected to Ray."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._lock = Lock()

    def send(self, inbox: str, message: bytes, refs: list[Any]) -> Any:
        """Begins to deliver; messages to one inbox keep their order. Gives what `wait` waits for. Raises RayError (the
        actor is gone) or ValueError (no actor of that name)."""
        return self._actor(inbox).deliver.remote(message, refs)

    def wait(self, inbox: str, sent: list[Any], timeout_s: float) -> None:
        """Until all of it is delivered. Raises RayError: the actor is gone, late, or its inbox full."""
        self._get(inbox, sent, timeout_s)

    def greet(self, inbox: str, record: bytes) -> bytes:
        """Raises TransferFailed."""
        try:
            answer: bytes = self._get(inbox, self._actor(inbox).greet.remote(record), _GREET_S)
        except (RayError, ValueError) as error:
            raise TransferFailed(short(error)) from None
        return answer

    def _get(self, inbox: str, call: Any, timeout_s: float) -> Any:
        try:
            return ray.get(call, timeout=timeout_s)
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


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
