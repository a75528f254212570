"""How well a KV pool is used: which blocks are in which state, and how much of the held ones is filled."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.ids import BlockId, SequenceId
from .ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceUse:
    """What one sequence has of the pool."""

    sequence_id: SequenceId
    blocks: int
    shared_blocks: int  # of these, that another holds too
    tokens: int  # whose KV is there
    unused_slots: int  # places for tokens in its blocks that hold none


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReport:
    """One moment of a pool. A block is free, cached or held; pinned ones are held."""

    block_tokens: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    held_blocks: int
    pinned_blocks: int
    unused_slots: int  # in held blocks, each block counted once
    sequences: tuple[SequenceUse, ...]

    @property
    def fragmentation(self) -> float:
        """Share of the held blocks' places that hold no token: all of it in last blocks, since blocks are not split."""
        slots = self.held_blocks * self.block_tokens
        return self.unused_slots / slots if slots else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the pool's places that hold a token which a sequence, or a pin, needs now."""
        return (self.held_blocks * self.block_tokens - self.unused_slots) / (self.total_blocks * self.block_tokens)

    def __str__(self) -> str:
        lines = [
            f"{self.total_blocks} blocks of {self.block_tokens} tokens: {self.free_blocks} free, "
            f"{self.cached_blocks} cached, {self.held_blocks} held ({self.pinned_blocks} pinned)",
            f"utilisation {self.utilisation:.1%}, fragmentation {self.fragmentation:.1%} "
            f"({self.unused_slots} unused places in held blocks)",
        ]
        if self.sequences:
            lines.append(f"{'sequence':<32} {'blocks':>8} {'shared':>8} {'tokens':>8} {'unused':>8}")
        lines += [
            f"{use.sequence_id:<32} {use.blocks:>8} {use.shared_blocks:>8} {use.tokens:>8} {use.unused_slots:>8}"
            for use in self.sequences
        ]
        return "\n".join(lines)


def pool_report(
    ledger: Ledger,
    block_tokens: int,
    sequences: Iterable[tuple[SequenceId, Sequence[BlockId], int]],
    pins: Iterable[Sequence[BlockId]] = (),
) -> PoolReport:
    """sequences: (id, blocks, tokens whose KV is in them, from the first block on). pins: full blocks."""
    pins = list(pins)
    pinned = {block for blocks in pins for block in blocks}
    uses, tables = [], [(blocks, len(blocks) * block_tokens) for blocks in pins]
    for sequence_id, blocks, tokens in sequences:
        tables.append((blocks, tokens))
        uses.append(
            SequenceUse(
                sequence_id=sequence_id,
                blocks=len(blocks),
                shared_blocks=sum(ledger.holders(block) > 1 for block in blocks),
                tokens=tokens,
                unused_slots=len(blocks) * block_tokens - tokens,
            )
        )
    return PoolReport(
        block_tokens=block_tokens,
        total_blocks=ledger.num_blocks,
        free_blocks=ledger.free_count,
        cached_blocks=ledger.cached_count,
        held_blocks=ledger.held_count,
        pinned_blocks=len(pinned),
        unused_slots=unused_slots(block_tokens, tables),
        sequences=tuple(uses),
    )


def unused_slots(block_tokens: int, tables: Iterable[tuple[Sequence[BlockId], int]]) -> int:
    """Places that hold no token in blocks that hold some: (blocks, tokens in them) each, shared blocks counted once."""
    filled: Counter[BlockId] = Counter()
    for blocks, tokens in tables:
        for index, block in enumerate(blocks):
            here = min(max(tokens - index * block_tokens, 0), block_tokens)
            filled[block] = max(filled[block], here)
    return sum(block_tokens - count for count in filled.values())
