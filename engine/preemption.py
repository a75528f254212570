"""How a sequence gives its blocks back without losing anything: by swap to host memory, or by computing them again."""

from dataclasses import dataclass

from .holdings import Holdings
from .members import Member
from .swap import SwapSpace, cheaper_to_swap

_NEW_SHARE = 0.2  # of the last measurement in a moving average
_RETRY = 16  # of so many that are computed again because swaps were slow, one is swapped: they may have become faster


@dataclass(frozen=True, slots=True)
class PreemptionCounts:
    swapped: int
    recomputed: int
    swap_bytes: int  # to host memory and back


class Preemption:
    """Decides between the two ways by what each is predicted to take, from what both took before."""

    def __init__(self, holdings: Holdings, space: SwapSpace | None, block_bytes: int) -> None:
        self._holdings = holdings
        self._space = space
        self._block_bytes = block_bytes
        self._tokens_per_s = 0.0  # of prompts computed; 0: not known yet
        self._refused = 0  # swaps, since the last one
        self._swapped = self._recomputed = self._swap_bytes = 0

    @property
    def counts(self) -> PreemptionCounts:
        return PreemptionCounts(self._swapped, self._recomputed, self._swap_bytes)

    def computed(self, tokens: int, seconds: float) -> None:
        """So many tokens of prompts were computed in one step."""
        if seconds > 0:
            rate = tokens / seconds
            self._tokens_per_s += (rate - self._tokens_per_s) * (_NEW_SHARE if self._tokens_per_s else 1.0)

    def take_blocks(self, member: Member) -> None:
        """All blocks of a sequence that no step under way has. What they hold is kept, or computed again later."""
        seq, space = member.seq, self._space
        count = self._holdings.blocks_for(seq.computed)
        num_bytes = count * self._block_bytes
        # What a prompt's chunks tell of it is lost with its row, so a prompt that is asked about begins anew.
        keeps = seq.sampling.prompt_logprobs is None or bool(seq.tokens)
        if space is not None and keeps and 0 < count <= space.free_count and self._pays(num_bytes, seq.computed, space):
            member.swapped = space.swap_out(seq.blocks[:count])
        if member.swapped is None:
            self._recomputed += 1
        else:
            member.swapped_tokens = seq.computed
            self._swapped += 1
            self._swap_bytes += num_bytes
        self._holdings.release(seq)

    def give_back(self, member: Member, known: int) -> None:
        """A sequence has blocks again, the first `known` of them found in the prefix cache: fill the others."""
        if member.swapped is not None and self._space is not None:
            (ticket, tokens), member.swapped, member.swapped_tokens = (member.swapped, member.swapped_tokens), None, 0
            blocks = member.seq.blocks[: self._holdings.blocks_for(tokens)]
            self._space.swap_in(ticket, blocks, skip=known)
            self._swap_bytes += max(len(blocks) - known, 0) * self._block_bytes
            # More may be known by now than went away: what is shared is never computed again.
            self._holdings.advance(member.seq, max(tokens, member.seq.computed))

    def drop(self, member: Member) -> None:
        """It will not come back."""
        if member.swapped is not None and self._space is not None:
            self._space.drop(member.swapped)
            member.swapped, member.swapped_tokens = None, 0

    def _pays(self, num_bytes: int, tokens: int, space: SwapSpace) -> bool:
        pays = cheaper_to_swap(num_bytes, space.bytes_per_s, tokens, self._tokens_per_s)
        self._refused = 0 if pays or self._refused == _RETRY - 1 else self._refused + 1
        return pays or self._refused == 0
