"""How often each block of a KV pool was given to a new holder: what a reader of the mapped pool looks at.

    offset 0    64
           | epoch | generation of block 0 | of block 1 | ...    aligned 8-byte words

The pool's ledger is the only writer. It renews a block's word before the new holder can write into the block; a reader
that finds the same word before and after it copied the block has copied what was announced. The epoch says which life
of the worker the pool belongs to; it is 0 once that life is over in good order.
"""

from collections.abc import Iterable

from .segment import LINE, WORD, Fence, Segment

HEAD = LINE
"""Bytes before the first block's word."""


class Generations:
    """The writer's side."""

    def __init__(self, segment: Segment, num_blocks: int) -> None:
        self._segment = segment
        self._fence = Fence()
        self._epoch = segment.word(0)
        self._words = memoryview(segment.shared)[HEAD : HEAD + num_blocks * WORD].cast("Q")

    @classmethod
    def create(cls, num_blocks: int) -> "Generations":
        """All zero, of no epoch yet."""
        return cls(Segment.create(HEAD + num_blocks * WORD), num_blocks)

    @property
    def address(self) -> str:
        """Of the segment, for readers on this host."""
        return self._segment.address

    def begin(self, epoch: int) -> None:
        """0: this life is over, nothing that is read from now on counts."""
        self._epoch[0] = epoch
        self._fence()

    def renew(self, blocks: Iterable[int]) -> None:
        """They are about to be given to a new holder. Readers of whatever is written from the return on will notice."""
        for block in blocks:
            self._words[block] += 1
        self._fence()

    def of(self, blocks: Iterable[int]) -> tuple[int, ...]:
        return tuple(self._words[block] for block in blocks)

    def close(self) -> None:
        """Nobody can open it from now on; those who have keep it."""
        self._segment.close()
