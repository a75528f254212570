"""Other workers' ranks, as Ray reaches them: named actors of one namespace, an actor's name is its inbox."""

from threading import Lock
from typing import Any

import ray
from ray.exceptions import RayError

from ..core.errors import TransferFailed

NAMESPACE = "baton"
"""An actor's method `deliver` takes a message, as bytes, and `greet` answers a handshake: see kv_transfer/inbox.py."""

_GREET_S = 20.0


class RayRanks:
    """Thread-safe. Needs a process that is connected to Ray."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._lock = Lock()

    def deliver(self, inbox: str, message: bytes, refs: list[Any], timeout_s: float | None) -> None:
        """timeout_s: None does not wait. Raises RayError (the actor is gone, late, or its inbox full) or ValueError (no
        actor of that name)."""
        call = self._actor(inbox).deliver.remote(message, refs)
        if timeout_s is not None:
            self._wait(inbox, call, timeout_s)

    def greet(self, inbox: str, record: bytes) -> bytes:
        """Raises TransferFailed."""
        try:
            answer: bytes = self._wait(inbox, self._actor(inbox).greet.remote(record), _GREET_S)
        except (RayError, ValueError) as error:
            raise TransferFailed(short(error)) from None
        return answer

    def _wait(self, inbox: str, call: Any, timeout_s: float) -> Any:
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
