"""When a broken stream is asked for again. Pure: the two clients do the calling and the waiting.

Asking again is safe because the request keeps its id and its seed, and says how far it got: the router that knows it
goes on from there, and one that does not computes the same tokens and leaves out those that came.
"""

import random
from dataclasses import dataclass, replace

from ..core.errors import BatonError, Overloaded, Unavailable
from .results import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Exponential backoff with full jitter (Brooker, "Exponential Backoff And Jitter", 2015)."""

    tries: int = 7  # without progress in between, the first one among them: about 2.5 s, a router restarts in 1 to 2
    first_s: float = 0.1
    most_s: float = 2.0

    def delay_s(self, failures: int) -> float:
        """Seconds to wait after so many failures, 1 or more."""
        return random.uniform(0, min(self.most_s, self.first_s * 2 ** (failures - 1)))  # noqa: S311  # no secret


class StreamProgress:
    """How far one stream got, over all its tries."""

    def __init__(self, retry: Retry, answers: int, resume_after_seq: int = 0) -> None:
        self._retry = retry
        self._answers = answers
        self._failures = 0
        self._got_something = False
        self.seq = resume_after_seq
        self.ended = False

    def take(self, message: Message) -> Message | None:
        """Note a message; gives what of it is to be shown, None for one whose tokens all came already."""
        tokens = sum(len(output.token_ids) for output in message.outputs)
        old = message.seq < self.seq or (message.seq == self.seq and tokens > 0)
        self.seq = max(self.seq, message.seq)
        self.ended = message.usage is not None
        self._failures = 0
        self._got_something = True
        if not old:
            return message
        if not self.ended:
            return None
        outputs = tuple(
            replace(output, text="", token_ids=(), logprobs=(), prompt_logprobs=()) for output in message.outputs
        )
        return replace(message, outputs=outputs)

    def after(self, error: BatonError) -> float | None:
        """Seconds to wait before asking again, or None when the error is the caller's to see.

        With several answers and no word of how they were mixed, a router that does not know the request could not
        tell which tokens came; so only a request that got nothing yet is repeated then.
        """
        self._failures += 1
        if not isinstance(error, Unavailable | Overloaded) or self._failures >= self._retry.tries:
            return None
        if self._answers > 1 and self._got_something:
            return None
        asked_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
        return max(self._retry.delay_s(self._failures), asked_s)
