"""What ranks tell each other beside a Piece, and what a transport tells its own rank."""

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


@dataclass(frozen=True, slots=True)
class Hello:
    """Source to reader, first on a stream: whose it is. `token` came with the reader's answer to the handshake."""

    token: bytes


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A transport to its own rank: the stream with this peer has closed. Nothing more comes from it, and what it was
    promised it does not read any more. Never on the wire."""

    inbox: str  # the peer's


Message = Piece | Returned
"""What a peer's rank may tell."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message in an inbox. `handles` are the transport's own (for the object store: one ref, or none)."""

    message: Message | PeerLost
    handles: tuple[object, ...] = ()
