"""What a relay asks of the fleet: seats on workers, and news from them. Tests put their own fleet behind it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from ..core.ids import WorkerId
from ..core.request import Ended, Request, SequenceTokens
from ..core.tickets import Ticket
from .placement import Need, Placement


class News(NamedTuple):
    """All that one frame says of one sequence. `lost`: the link closed, and nothing more will come.

    A tuple, as one is made for each token: a third of what a frozen dataclass takes."""

    ticket: Ticket | None = None
    tokens: tuple[SequenceTokens, ...] = ()
    plain: Sequence[tuple[int, int]] = ()  # (position, token), of tokens with nothing beside them
    ended: Ended | None = None
    lost: bool = False


Listener: TypeAlias = Callable[[News], None]


class Seat(Protocol):
    """Room for one sequence on one worker, counted from the moment it is given. Whoever has it must release it."""

    @property
    def worker_id(self) -> WorkerId: ...

    def admit(self, request: Request, listener: Listener) -> None:
        """Sends the sequence. `listener` hears of it until the seat is released, never within this call.
        Raises Overloaded or Unavailable; then nothing was sent."""

    def hand_over(self, ticket: Ticket) -> None:
        """On a prefill worker: names the reader of this sequence's KV. Raises as `admit` does."""

    def release(self) -> None:
        """Ends the sequence there, unless it has ended. Never fails; a second time changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    placement: Placement
    prefill: Seat
    decode: Seat | None  # None: the one seat does all of it

    def release(self) -> None:
        self.prefill.release()
        if self.decode is not None:
            self.decode.release()


class Workers(Protocol):
    async def seats(self, need: Need) -> Seats:
        """Waits until a pair of workers, or one that is both, has room. Raises Unavailable or Overloaded when the wait
        is too long or too many wait already. Cancelled, it keeps no seat."""
