"""Which workers take a sequence. Pure: from a picture of the fleet to a decision, tested with plain lists.

A sequence goes to a pair, one worker that prefills and one that decodes, or to a single worker that does both. Of pairs
the least loaded: the prefill worker with the fewest prompt tokens ahead, the decode worker with the fewest sequences,
then the most free blocks. Between the best pair and the best single worker their predicted loads decide, in tokens:

    load = prompt tokens ahead where it prefills + sequences where it decodes

as each sequence there puts one token into every step. At equal loads the pair, whose prompts hold up no answers.

Room: workers that decode grow a sequence block by block and preempt others when blocks run out, so they are asked only
when their pool can hold the prompt and all of the answer, and their free blocks the prompt and PREDICTED_TOKENS of
it. That leaves a sequence room to begin; what all of them may become is not kept free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..core.ids import WorkerId

PREDICTED_TOKENS = 64
"""How far an answer is expected to grow before blocks of others come back. Four blocks of 16: so that a worker does not
preempt at once what it has just begun, and few blocks stand idle where answers are short."""


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One linked worker at one moment; what this router has claimed and the worker not yet reported is counted in."""

    worker_id: WorkerId
    role: Role
    model_fingerprint: str  # workers of different ones can't exchange KV
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

    def prompt_blocks(self, block_tokens: int) -> int:
        return -(-self.prompt_tokens // block_tokens)

    def blocks(self, block_tokens: int) -> int:
        """Blocks that prompt and whole answer fill."""
        return -(-(self.prompt_tokens + self.max_tokens - 1) // block_tokens)  # the last token's KV is never written

    def blocks_soon(self, block_tokens: int) -> int:
        """Blocks that prompt and predicted growth fill."""
        growth = min(self.max_tokens - 1, PREDICTED_TOKENS)
        return -(-(self.prompt_tokens + growth) // block_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    prefill: WorkerId
    decode: WorkerId | None  # None: the one before does all of it
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlace:
    reason: str
    full: bool = False  # there are workers, and none has room now: waiting helps


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """A placement and what it is weighed by."""

    placement: Placement
    avoided: bool  # it has a worker that failed this sequence before
    load: int


def place(need: Need, workers: Sequence[WorkerView]) -> Placement | NoPlace:
    """The least loaded pair of workers that understand each other, or worker that is both; or why there is none."""
    taking = [view for view in workers if not view.draining]
    prefills, decodes, boths = ([view for view in taking if view.role is role] for role in Role)
    found: list[_Choice | NoPlace] = []
    if need.decodes:
        if boths:
            found.append(_single(need, boths))
        if prefills and decodes:
            found.append(_pair(need, prefills, decodes))
    elif prefills or boths:  # any of them gives one token, without a hand-over
        found.append(_one_token(need, [*prefills, *boths]))
    choices = [one for one in found if isinstance(one, _Choice)]
    if choices:
        return min(choices, key=lambda one: (one.avoided, one.load, one.placement.decode is None)).placement
    refusals = [one for one in found if isinstance(one, NoPlace)]
    if refusals:
        return NoPlace(reason="; ".join(one.reason for one in refusals), full=any(one.full for one in refusals))
    missing = [Role.PREFILL] * (not prefills) + [Role.DECODE] * (need.decodes and not decodes)
    return NoPlace(reason=f"no {' and no '.join(missing)} worker is linked and taking requests, nor one of role both")


def _pair(need: Need, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView]) -> _Choice | NoPlace:
    prefills = _holding_prompt(need, prefills)
    if not prefills:
        return _too_long(need, Role.PREFILL)
    known = {view.model_fingerprint for view in prefills}
    matching = [view for view in decodes if view.model_fingerprint in known]
    if not matching:
        return NoPlace(reason="prefill and decode workers serve different models")
    able = _with_room(need, matching)
    if not able:
        return _no_room(need, matching)
    decode = min(able, key=lambda view: _decode_rank(view, need))
    partners = [view for view in prefills if view.model_fingerprint == decode.model_fingerprint]
    prefill = min(partners, key=lambda view: _prefill_rank(view, need))
    reason = f"{_why_prefill(prefill, partners)}; {_why_decode(decode, able)}"
    return _Choice(
        placement=Placement(prefill=prefill.worker_id, decode=decode.worker_id, reason=reason),
        avoided=not need.avoid.isdisjoint((prefill.worker_id, decode.worker_id)),
        load=prefill.waiting_tokens + decode.sequences,
    )


def _single(need: Need, boths: Sequence[WorkerView]) -> _Choice | NoPlace:
    able = _with_room(need, boths)
    if not able:
        return _no_room(need, boths)
    chosen = min(able, key=lambda view: _single_rank(view, need))
    reason = f"{_why_decode(chosen, able)}, {chosen.waiting_tokens} prompt tokens ahead"
    return _Choice(
        placement=Placement(prefill=chosen.worker_id, decode=None, reason=reason),
        avoided=chosen.worker_id in need.avoid,
        load=_load(chosen),
    )


def _one_token(need: Need, candidates: Sequence[WorkerView]) -> _Choice | NoPlace:
    able = _holding_prompt(need, candidates)
    if not able:
        return _too_long(need, candidates[0].role)
    chosen = min(able, key=lambda view: _prefill_rank(view, need))
    reason = f"{_why_prefill(chosen, able)}; one token needs no decode worker"
    placement = Placement(prefill=chosen.worker_id, decode=None, reason=reason)
    return _Choice(placement=placement, avoided=chosen.worker_id in need.avoid, load=_load(chosen))


def _holding_prompt(need: Need, views: Sequence[WorkerView]) -> list[WorkerView]:
    """Prompts may wait at the worker, so nothing needs to be free."""
    return [view for view in views if need.prompt_blocks(view.block_tokens) <= view.total_blocks]


def _with_room(need: Need, views: Sequence[WorkerView]) -> list[WorkerView]:
    return [view for view in views if _ever(need, view) and need.blocks_soon(view.block_tokens) <= view.free_blocks]


def _ever(need: Need, view: WorkerView) -> bool:
    return need.blocks(view.block_tokens) <= view.total_blocks


def _too_long(need: Need, role: Role) -> NoPlace:
    return NoPlace(reason=f"no {role} worker's pool holds a prompt of {need.prompt_tokens} tokens")


def _no_room(need: Need, views: Sequence[WorkerView]) -> NoPlace:
    role = views[0].role
    large = [view for view in views if _ever(need, view)]
    if not large:
        best = max(views, key=lambda view: view.total_blocks)
        return NoPlace(
            reason=f"prompt and answer may fill {need.blocks(best.block_tokens)} blocks; "
            f"the largest pool of {len(views)} {role} workers has {best.total_blocks}"
        )
    best = max(large, key=lambda view: view.free_blocks)
    return NoPlace(
        reason=f"prompt and the answer's beginning fill {need.blocks_soon(best.block_tokens)} blocks; "
        f"the emptiest of {len(large)} {role} workers has {best.free_blocks} free",
        full=True,
    )


def _load(view: WorkerView) -> int:
    return view.waiting_tokens + view.sequences


def _prefill_rank(view: WorkerView, need: Need) -> tuple[bool, int, int, int, str]:
    return (view.worker_id in need.avoid, view.waiting_tokens, view.sequences, -view.free_blocks, view.worker_id)


def _decode_rank(view: WorkerView, need: Need) -> tuple[bool, int, int, str]:
    return (view.worker_id in need.avoid, view.sequences, -view.free_blocks, view.worker_id)


def _single_rank(view: WorkerView, need: Need) -> tuple[bool, int, int, str]:
    return (view.worker_id in need.avoid, _load(view), -view.free_blocks, view.worker_id)


def _why_prefill(view: WorkerView, among: Sequence[WorkerView]) -> str:
    kind = "prefill workers" if all(one.role is Role.PREFILL for one in among) else "workers that prefill"
    return f"{view.worker_id} of {len(among)} {kind}: {view.waiting_tokens} prompt tokens ahead"


def _why_decode(view: WorkerView, among: Sequence[WorkerView]) -> str:
    return (
        f"{view.worker_id} of {len(among)} {view.role} workers with room: "
        f"{view.sequences} sequences, {view.free_blocks} blocks free"
    )
