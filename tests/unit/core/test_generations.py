"""A reader of the segment sees what the writer has renewed."""

import mmap
import struct

import pytest

from baton.core.generations import Generations
from baton.core.ids import BlockId
from baton.core.segment import LINE, WORD, RankLost, Segment
from baton.engine.ledger import Ledger


def seen(generations: Generations, count: int) -> tuple[int, ...]:
    """By who opens the address: the epoch, and the words of the blocks."""
    segment = Segment.open(generations.address, writable=False)
    segment.close()
    words = struct.unpack_from(f"{count}Q", segment.shared, LINE)
    return (*struct.unpack_from("Q", segment.shared), *words)


def test_blocks_get_a_new_word_whenever_the_ledger_gives_them_out() -> None:
    generations = Generations.create(4)
    ledger = Ledger(4, generations.renew)
    generations.begin(7)
    blocks = ledger.allocate(2)
    assert seen(generations, 4) == (7, 1, 1, 0, 0)
    ledger.hold(blocks)
    ledger.release(blocks)
    assert seen(generations, 4) == (7, 1, 1, 0, 0)
    ledger.release(blocks)
    ledger.release(ledger.allocate(4))
    assert seen(generations, 4) == (7, 2, 2, 1, 1)
    assert generations.of([BlockId(3), BlockId(0)]) == (1, 2)
    generations.begin(0)
    assert seen(generations, 1)[0] == 0


def test_a_segment_opened_for_reading_can_be_neither_written_nor_cut_short() -> None:
    made = Segment.create(LINE + WORD)
    opened = Segment.open(made.address, writable=False)
    with pytest.raises(TypeError):
        opened.shared[0] = 1
    with pytest.raises((ValueError, OSError, SystemError)):
        made.shared.resize(mmap.PAGESIZE * 2)
    made.close()
    with pytest.raises(RankLost):
        Segment.open(made.address)
