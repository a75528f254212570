"""The sequences of one rank: who is here, over which link, until when; and who may still come in."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

from ..core.errors import BatonError, ContextExceeded, InvalidRequest, Overloaded, Unavailable
from ..core.ids import SequenceId
from ..core.request import Ended, EndReason, Request, Sampling


@dataclass(slots=True)
class Member:
    """One admitted sequence; roles add their own state."""

    link: int
    request: Request
    arrived_ns: int  # Unix time
    deadline: float | None  # on the loop's clock

    @property
    def sequence_id(self) -> SequenceId:
        return self.request.sequence_id


M = TypeVar("M", bound=Member)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of admission."""

    max_waiting: int
    max_model_len: int
    num_blocks: int
    vocab_size: int


class Roster(Generic[M]):
    """Owns who is admitted. `waiting` are those for which nothing is held yet, first come first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._members: dict[SequenceId, M] = {}
        self._deadlines: list[tuple[float, int, M]] = []  # a heap; of some that have left too
        self._numbers = count()
        self.waiting: dict[SequenceId, M] = {}
        self.draining = False

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[M]:
        return iter(self._members.values())

    def __contains__(self, sequence_id: SequenceId) -> bool:
        return sequence_id in self._members

    def get(self, sequence_id: SequenceId) -> M | None:
        return self._members.get(sequence_id)

    def get_of(self, link: int, sequence_id: SequenceId) -> M | None:
        """The sequence, if it came over this link: a router speaks of its own alone."""
        member = self._members.get(sequence_id)
        return member if member is not None and member.link == link else None

    def admit(self, member: M, blocks_needed: int) -> BatonError | None:
        """Take a new sequence in as waiting, or say why not. The caller has looked that it is not here already."""
        error = self._objection(member.request, blocks_needed)
        if error is None:
            self._members[member.sequence_id] = self.waiting[member.sequence_id] = member
            if member.deadline is not None:
                heapq.heappush(self._deadlines, (member.deadline, next(self._numbers), member))
        return error

    def start(self, member: M) -> None:
        """It no longer waits."""
        del self.waiting[member.sequence_id]

    def remove(self, member: M) -> None:
        self._members.pop(member.sequence_id, None)
        self.waiting.pop(member.sequence_id, None)

    def of_link(self, link: int) -> list[M]:
        return [member for member in self if member.link == link]

    def expired(self, now: float) -> list[M]:
        """Those whose deadline has passed; each is named once, and the caller ends it."""
        found: list[M] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, member = heapq.heappop(self._deadlines)
            if self._members.get(member.sequence_id) is member:
                found.append(member)
        return found

    def next_deadline(self) -> float | None:
        while self._deadlines:
            deadline, _, member = self._deadlines[0]
            if self._members.get(member.sequence_id) is member:
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def _objection(self, request: Request, blocks_needed: int) -> BatonError | None:
        limits, length = self._limits, len(request.prompt) + request.sampling.max_tokens
        if self.draining:
            return Unavailable("the worker is draining")
        if any(token >= limits.vocab_size for token in (max(request.prompt), *_edited_tokens(request.sampling))):
            return InvalidRequest(f"the request holds a token beyond the model's {limits.vocab_size}")
        if length > limits.max_model_len:
            return ContextExceeded(
                f"prompt and answer are {length} tokens together, the model's context holds {limits.max_model_len}"
            )
        if blocks_needed > limits.num_blocks:
            return ContextExceeded(
                f"the sequence needs {blocks_needed} KV blocks, the worker's memory holds {limits.num_blocks}"
            )
        if len(self.waiting) >= limits.max_waiting:
            return Overloaded(f"{limits.max_waiting} sequences wait at the worker already")
        return None


def _edited_tokens(sampling: Sampling) -> set[int]:
    """Those whose logits are changed, whatever is in prompt and answer."""
    biased = {token for token, _ in sampling.logit_bias}
    return biased | sampling.stop_token_ids if sampling.min_tokens else biased


def failed(sequence_id: SequenceId, error: BatonError) -> Ended:
    return Ended(sequence_id=sequence_id, reason=EndReason.FAILED, error_code=error.code, error_message=str(error))
