"""What ranks tell each other beside a Piece: that lent blocks may go back."""

from dataclasses import dataclass

from ..core.ids import Epoch, SequenceId, TicketId
from ..core.tickets import Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """Reader to source: nothing of this ticket is read any more, the source takes its blocks back.

    `error_code` is empty when the reader has committed; else it names why the reader refused or gave up.
    """

    ticket_id: TicketId
    sequence_id: SequenceId
    source_epoch: Epoch
    error_code: str = ""
    error_message: str = ""


Message = Piece | Returned


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message in an inbox. `handles` are the transport's own (for the object store: one ref, or none)."""

    message: Message
    handles: tuple[object, ...] = ()
