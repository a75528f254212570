"""A piece of KV as a prefill worker announces it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from baton.core.ids import Epoch, SequenceId, TicketId, WorkerId
from baton.core.tickets import Geometry, Piece


def a_piece(geometry: Geometry, blocks: Sequence[int] = (), **changes: Any) -> Piece:
    """Of ticket t, for sequence s/0, from worker P, both ends in their first life; but for `changes`."""
    piece = Piece(
        ticket_id=TicketId("t"),
        sequence_id=SequenceId("s/0"),
        reader_epoch=Epoch(1),
        source=WorkerId("P"),
        source_epoch=Epoch(1),
        source_inbox="P",
        blocks=tuple(blocks),
        checksums=(),
        geometry=geometry,
    )
    return replace(piece, **changes)
