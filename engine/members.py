"""A sequence as the batch sees it: what is to become of it, where it is on the way, what it waits with."""

from dataclasses import dataclass
from enum import Enum, auto

from .sequence import Sequence
from .swap import SwapTicket


class Goal(Enum):
    ANSWER = auto()  # compute the prompt, then the answer until it ends
    PROMPT = auto()  # compute the prompt and the first token; the KV stays until it is released
    LANDING = auto()  # the prompt's KV comes from elsewhere; then the answer until it ends


class State(Enum):
    WAITING = auto()  # holds no block
    RESERVED = auto()  # LANDING: has blocks, the KV is on its way
    READY = auto()  # has its KV, no row yet
    RUNNING = auto()  # has a row
    DONE = auto()  # PROMPT: computed; holds its blocks until it is removed
    LEAVING = auto()  # over, but a step under way still has its row


@dataclass(slots=True, eq=False)
class Member:
    """One sequence in the care of a batch."""

    seq: Sequence
    goal: Goal
    arrived: float  # on the caller's clock, in seconds
    state: State = State.WAITING
    spare: int = 0  # blocks that must stay available when it starts
    row: int = -1
    swapped: SwapTicket | None = None  # its KV, in host memory, while it waits ...
    swapped_tokens: int = 0  # ... of so many tokens; 0 where there is none
    gives_back: bool = False  # is to be preempted as soon as no step under way has it

    @property
    def lands(self) -> bool:
        """It waits for KV of another worker; once preempted it no longer does."""
        return self.goal is Goal.LANDING and not self.seq.tokens

    @property
    def tokens_ahead(self) -> int:
        """Of its prompt, that are still to be computed here, while it holds no block."""
        return 0 if self.lands else max(len(self.seq.prompt) - self.swapped_tokens, 0)

    @property
    def limit(self) -> int:
        """Tokens when it leaves the batch at the latest."""
        return len(self.seq.prompt) + 1 if self.goal is Goal.PROMPT else self.seq.max_length

    @property
    def chunked(self) -> bool:
        """It is computed in chunks, of one token too: something is to be learnt of its prompt."""
        asks = self.seq.sampling.prompt_logprobs is not None and not self.seq.tokens
        return asks or self.goal is Goal.PROMPT
