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

Indices = frozenset[int] | set[int]
"""Of blocks in the prompt. Sets, since what is asked of them for each piece must not take longer with the prompt."""


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


def is_needed(cut: Cut, wanted: Indices, source_block: int) -> bool:
    """Whether a source block holds any token of a wanted block. Else a piece that names it does not fit its ticket."""
    tokens = tokens_of((source_block,), cut.source_block, cut.prompt_tokens)
    return any(block in wanted for run in tokens for block in blocks_of(run, cut.reader_block))


def next_source_parcel(
    cut: Cut, wanted: Indices, table: Sequence[BlockId], announced_tokens: int, computed_tokens: int
) -> Parcel:
    """What can be announced once more of the prompt's tokens have their KV than when something was announced last.

    wanted: the reader's blocks. table: the prompt's blocks at the source, by index. A block is complete with its last
    token, or the prompt's, and announced just once, if the reader wants anything of it.
    """
    new = range(_complete(cut, announced_tokens), _complete(cut, computed_tokens))
    indices = tuple(index for index in new if is_needed(cut, wanted, index))
    return Parcel(indices, tuple(table[index] for index in indices))


def brought(cut: Cut, wanted: Indices, piece: Collection[int]) -> tuple[range, ...]:
    """The prompt's tokens that a piece of these source blocks brings to the wanted blocks: rising, apart.

    Nothing that is not wanted, whatever the piece names.
    """
    given = tokens_of(piece, cut.source_block, cut.prompt_tokens)
    asked = tokens_of(wanted.intersection(_touched(cut, given)), cut.reader_block, cut.prompt_tokens)
    return tuple(common(asked, given))


def completed(cut: Cut, wanted: Indices, arrived: Indices, piece: Collection[int]) -> tuple[int, ...]:
    """The wanted blocks that a piece of source blocks completes, rising, once those of `arrived` are there.

    Those that were complete before are not named again, so over all pieces each wanted block is named once.
    """
    new = {index for index in piece if index not in arrived}
    touched = _touched(cut, tokens_of(new, cut.source_block, cut.prompt_tokens))
    return tuple(
        block
        for block in sorted(wanted.intersection(touched))
        if all(index in new or index in arrived for index in _needed_for(cut, block))
    )


def common(ours: Sequence[range], theirs: Sequence[range]) -> Iterator[range]:
    """What is in both of two rising lists of ranges that lie apart."""
    i = j = 0
    while i < len(ours) and j < len(theirs):
        both = range(max(ours[i].start, theirs[j].start), min(ours[i].stop, theirs[j].stop))
        if both:
            yield both
        if ours[i].stop < theirs[j].stop:
            i += 1
        else:
            j += 1


def _complete(cut: Cut, computed_tokens: int) -> int:
    """How many of the source's blocks get no more of the prompt's tokens."""
    if computed_tokens < cut.prompt_tokens:
        return computed_tokens // cut.source_block
    return -(-cut.prompt_tokens // cut.source_block)


def _touched(cut: Cut, runs: Iterable[range]) -> Iterator[int]:
    """The reader's blocks that hold any of these tokens."""
    return (block for run in runs for block in blocks_of(run, cut.reader_block))


def _needed_for(cut: Cut, block: int) -> Iterator[int]:
    """The source's blocks that hold a block of the reader."""
    runs = tokens_of((block,), cut.reader_block, cut.prompt_tokens)
    return (index for run in runs for index in blocks_of(run, cut.source_block))
