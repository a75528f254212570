"""The hand-over of KV from a prefill worker to a decode worker: ticket, geometry, piece."""

from dataclasses import dataclass

from .ids import BlockId, Epoch, SequenceId, TicketId, WorkerId

KV_WIDTHS = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
"""Bytes of one number of the KV, by dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What a block looks like on one side: all ranks of a stage together, however they split the heads."""

    num_layers: int  # of this stage ...
    num_kv_heads: int
    head_size: int
    block_tokens: int
    dtype: str  # one of KV_WIDTHS
    fingerprint: str  # of model and KV dtype, as in block keys: equal ones hold the same numbers
    first_layer: int = 0  # ... which are [first_layer, first_layer + num_layers) of the model
    model: str = ""  # fingerprint of the model alone: equal ones hold the same numbers but for rounding; "": not said

    @property
    def layers(self) -> range:
        """Of the model."""
        return range(self.first_layer, self.first_layer + self.num_layers)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: all layers, K and V."""
        return self.num_layers * 2 * self.num_kv_heads * self.block_tokens * self.head_size * KV_WIDTHS[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A decode worker's reservation for one hand-over."""

    ticket_id: TicketId
    worker_id: WorkerId  # of the reader
    epoch: Epoch  # of the reader
    wanted: tuple[int, ...]  # prompt blocks the reader lacks, by index, rising
    geometry: Geometry  # of the reader
    lease_s: float  # asked for; counted by the source alone
    inbox: str  # where the reader's rank takes announcements


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """KV of some blocks that a source announces to a reader, named by the reader's ticket."""

    ticket_id: TicketId
    sequence_id: SequenceId
    reader_epoch: Epoch
    source: WorkerId
    source_epoch: Epoch
    source_inbox: str  # where the source's rank takes the release
    blocks: tuple[int, ...]  # which prompt blocks, by index, rising
    checksums: tuple[int, ...]  # one per block, bound to ticket and index: see kv_transfer/integrity.py; or none
    geometry: Geometry  # of the source
    last: bool = False  # nothing follows; the first token comes with it
    first_token: int | None = None
    source_blocks: tuple[BlockId, ...] = ()  # where they lie in the source's pool, if that is mapped ...
    generations: tuple[int, ...] = ()  # ... and their words as of the announcement: see core/generations.py
