"""Which workers take a sequence. Pure: from a picture of the fleet to a decision, tested with plain lists.

Least loaded: the prefill worker with the fewest prompt tokens ahead, the decode worker with the fewest sequences, then
the most free blocks. A decode worker is asked only when it can hold the prompt and all of the answer, as it reserves
both at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..core.ids import WorkerId


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One linked worker at one moment; what this router has claimed and the worker not yet reported is counted in."""

    worker_id: WorkerId
    role: Role
    fingerprint: str  # workers of different ones can't exchange blocks
    block_tokens: int
    total_blocks: int
    free_blocks: int  # free or evictable, less what is claimed
    waiting_tokens: int = 0  # prompt tokens ahead
    sequences: int = 0  # running, waiting or claimed
    running: int = 0  # as the worker told, like the next
    waiting: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    prompt_tokens: int
    max_tokens: int
    avoid: frozenset[WorkerId] = frozenset()  # failed this sequence before: asked only when there is no other

    @property
    def decodes(self) -> bool:
        """A single token comes from prefill alone."""
        return self.max_tokens > 1

    def blocks(self, block_tokens: int) -> int:
        """Blocks that prompt and answer fill."""
        return -(-(self.prompt_tokens + self.max_tokens - 1) // block_tokens)  # the last token's KV is never written


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    prefill: WorkerId
    decode: WorkerId | None  # None: prefill alone
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlace:
    reason: str
    full: bool  # there are workers, and none has room now: waiting helps


def place(need: Need, workers: Sequence[WorkerView]) -> Placement | NoPlace:
    """The least loaded pair of workers that understand each other, or why there is none."""
    prefills = [view for view in workers if view.role is Role.PREFILL and not view.draining]
    decodes = [view for view in workers if view.role is Role.DECODE and not view.draining]
    if not prefills or (need.decodes and not decodes):
        missing = [role for role, found in ((Role.PREFILL, prefills), (Role.DECODE, decodes)) if not found]
        return NoPlace(reason=f"no {' and no '.join(missing)} worker is linked and taking requests", full=False)
    prefills = [view for view in prefills if -(-need.prompt_tokens // view.block_tokens) <= view.total_blocks]
    if not prefills:
        return NoPlace(reason=f"no prefill worker's pool holds a prompt of {need.prompt_tokens} tokens", full=False)
    if not need.decodes:
        chosen = min(prefills, key=lambda view: _prefill_rank(view, need))
        reason = f"{_why_prefill(chosen, prefills)}; one token needs no decode worker"
        return Placement(prefill=chosen.worker_id, decode=None, reason=reason)
    known = {view.fingerprint for view in prefills}
    matching = [view for view in decodes if view.fingerprint in known]
    if not matching:
        return NoPlace(reason="prefill and decode workers serve different models", full=False)
    able = [view for view in matching if need.blocks(view.block_tokens) <= view.free_blocks]
    if not able:
        best = max(matching, key=lambda view: view.free_blocks)
        return NoPlace(
            reason=f"prompt and answer may fill {need.blocks(best.block_tokens)} blocks; "
            f"the emptiest of {len(matching)} decode workers has {best.free_blocks} free",
            full=any(need.blocks(view.block_tokens) <= view.total_blocks for view in matching),
        )
    decode = min(able, key=lambda view: _decode_rank(view, need))
    partners = [view for view in prefills if view.fingerprint == decode.fingerprint]
    prefill = min(partners, key=lambda view: _prefill_rank(view, need))
    return Placement(
        prefill=prefill.worker_id,
        decode=decode.worker_id,
        reason=f"{_why_prefill(prefill, partners)}; {decode.worker_id} of {len(able)} decode workers with room: "
        f"{decode.sequences} sequences, {decode.free_blocks} blocks free",
    )


def _prefill_rank(view: WorkerView, need: Need) -> tuple[bool, int, int, int, str]:
    return (view.worker_id in need.avoid, view.waiting_tokens, view.sequences, -view.free_blocks, view.worker_id)


def _decode_rank(view: WorkerView, need: Need) -> tuple[bool, int, int, str]:
    return (view.worker_id in need.avoid, view.sequences, -view.free_blocks, view.worker_id)


def _why_prefill(view: WorkerView, among: Sequence[WorkerView]) -> str:
    return f"{view.worker_id} of {len(among)} prefill workers: {view.waiting_tokens} prompt tokens ahead"
