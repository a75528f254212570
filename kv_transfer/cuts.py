"""One prompt in blocks of two sizes: which blocks of the source hold what the reader wants, and the way back. Pure.

    source  |   0   |   1   |   2   |   3  .        a prompt of 7 units; its last blocks are partial
    reader  |       0       |       1      .        the reader wants block 1: blocks 2 and 3 of the source
            ^ token 0                      ^ the prompt's end

Both sides reckon it from the ticket, the two geometries and the prompt's length, so nothing of it is sent. A source
block may hold more than is wanted, or be wanted in several parts; a block of the reader may need several pieces.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..core.ids import BlockId
from .plan import Parcel


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A prompt, and how many tokens a block has on each side."""

    prompt_tokens: int
    source_block: int
    reader_block: int


@dataclass(frozen=True, slots=True)
class Part:
    """What the reader wants of one source block."""

    index: int  # of the block, in the prompt
    tokens: tuple[range, ...]  # counted from the block's first, rising, apart


def tokens_of(blocks: Iterable[int], block_tokens: int, prompt_tokens: int) -> tuple[range, ...]:
    """The prompt's tokens in these blocks: rising, neighbours joined. Blocks beyond the prompt's end hold none."""
    found: list[range] = []
    for block in sorted(set(blocks)):
        start, stop = block * block_tokens, min((block + 1) * block_tokens, prompt_tokens)
        if start >= stop:
            break
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(range(start, stop))
    return tuple(found)


def blocks_of(tokens: range, block_tokens: int) -> range:
    """The blocks that hold at least one of these tokens."""
    return range(tokens.start // block_tokens, -(-tokens.stop // block_tokens)) if tokens else range(0)


def source_blocks_for(cut: Cut, wanted: Iterable[int]) -> tuple[Part, ...]:
    """The source's blocks that hold the reader's wanted ones, rising, and which of their tokens are wanted."""
    parts: dict[int, list[range]] = {}
    for run in tokens_of(wanted, cut.reader_block, cut.prompt_tokens):
        for index in blocks_of(run, cut.source_block):
            first = index * cut.source_block
            start, stop = max(run.start - first, 0), min(run.stop - first, cut.source_block)
            parts.setdefault(index, []).append(range(start, stop))
    return tuple(Part(index, tuple(tokens)) for index, tokens in parts.items())


def next_source_parcel(
    cut: Cut, wanted: Iterable[int], announced: Collection[int], table: Sequence[BlockId], computed: int
) -> Parcel:
    """What can be announced now: blocks that the reader wants something of, complete, and not announced yet.

    wanted: the reader's blocks; announced: the source's; table: the prompt's blocks at the source, by index; computed:
    how many of the prompt's tokens have their KV. A block is complete with its last token, or the prompt's.
    """
    complete = -(-cut.prompt_tokens // cut.source_block)
    if computed < cut.prompt_tokens:
        complete = computed // cut.source_block
    needed = (part.index for part in source_blocks_for(cut, wanted))
    indices = tuple(index for index in needed if index < complete and index not in announced)
    return Parcel(indices, tuple(table[index] for index in indices))


def brought(cut: Cut, wanted: Iterable[int], piece: Collection[int]) -> tuple[range, ...]:
    """The prompt's tokens that a piece of these source blocks brings to the wanted blocks: rising, apart.

    Nothing that is not wanted, whatever the piece names.
    """
    asked = tokens_of(wanted, cut.reader_block, cut.prompt_tokens)
    return tuple(_common(asked, tokens_of(piece, cut.source_block, cut.prompt_tokens)))


def completed(cut: Cut, wanted: Collection[int], arrived: Collection[int], piece: Collection[int]) -> tuple[int, ...]:
    """The wanted blocks that a piece of source blocks completes, rising, once those of `arrived` are there.

    Those that were complete before are not named again, so over all pieces each wanted block is named once.
    """
    new = set(piece).difference(arrived)
    there = new.union(arrived)
    touched = {
        block
        for run in tokens_of(new, cut.source_block, cut.prompt_tokens)
        for block in blocks_of(run, cut.reader_block)
    }
    return tuple(block for block in sorted(touched.intersection(wanted)) if _needs(cut, block) <= there)


def _needs(cut: Cut, block: int) -> set[int]:
    """The source's blocks that hold a block of the reader."""
    return {part.index for part in source_blocks_for(cut, (block,))}


def _common(ours: Sequence[range], theirs: Sequence[range]) -> Iterator[range]:
    """Intersection of two rising lists of ranges."""
    i = j = 0
    while i < len(ours) and j < len(theirs):
        both = range(max(ours[i].start, theirs[j].start), min(ours[i].stop, theirs[j].stop))
        if both:
            yield both
        if ours[i].stop < theirs[j].stop:
            i += 1
        else:
            j += 1
