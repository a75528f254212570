"""Who is in a batch, and in which state. Moves sequences from one to the next; what is in a step it does not know.

    waiting --its turn, blocks--> running (has a row) ---------------------------> ended, or done (a prompt alone)
       ^   \\--lands: blocks--> reserved --landed--> ready --a row--> running
       +-------------------- preempted: swapped out, or to be computed again ------+

Rows of a step under way stay with their sequences: one that ends meanwhile is *leaving*, one that is to be preempted
*gives back*, until that step is taken in.
"""

from collections import Counter
from collections.abc import Iterable

from ..core.frames import PINNED, Holder
from ..core.ids import BlockId, SequenceId
from .engine import Engine
from .holdings import Holdings
from .members import Member, State
from .preemption import Preemption
from .rows import Rows
from .sampling_stage import SamplingStage
from .sequence import Sequence
from .waiting import Turns, WaitingList

_AHEAD_SHARE = 4  # reservations beyond the places: a quarter of them, so that a place that comes free is filled at once


class Residents:
    """Owns every sequence's state, and with it who holds rows and blocks."""

    def __init__(
        self,
        engine: Engine,
        rows: Rows,
        holdings: Holdings,
        preemption: Preemption,
        sampling: SamplingStage,
        turns: Turns,
    ) -> None:
        self._engine = engine
        self._rows = rows
        self._holdings = holdings
        self._preemption = preemption
        self._sampling = sampling
        self._turns = turns
        self._most = engine.max_batch + engine.max_batch // _AHEAD_SHARE + 1  # that run, are ready or reserved
        self._members: dict[SequenceId, Member] = {}
        self._tenants: Counter[str] = Counter()  # sequences of each
        self._reserved: dict[SequenceId, Member] = {}
        self._ready: dict[SequenceId, Member] = {}
        self._leaving: list[Member] = []
        self._giving_back: list[Member] = []
        self.waiting = WaitingList()
        self._refused = False  # somebody could not start for want of blocks, the last time that it was tried

    # Coming

    def add(self, member: Member) -> None:
        """A new one waits."""
        key = member.seq.sequence_id
        assert key not in self._members, f"{key} is here already"
        self._members[key] = member
        self._tenants[member.seq.tenant] += 1
        self.waiting.add(member)

    def get(self, seq: Sequence) -> Member | None:
        """None for a sequence that is not here, or not any more."""
        member = self._members.get(seq.sequence_id)
        return member if member is not None and member.seq is seq else None

    def of(self, seq: Sequence) -> Member:
        """Of a sequence that is here."""
        return self._members[seq.sequence_id]

    def landed(self, seq: Sequence, first_token: int, *, exact: bool) -> None:
        """The KV of a reserved sequence's prompt is in its blocks."""
        member = self._reserved.pop(seq.sequence_id)
        if not exact:
            self._holdings.keep_apart(seq)
        self._holdings.advance(seq, len(seq.prompt))
        seq.charged = len(seq.prompt)  # by who computed it
        seq.tokens.append(first_token)
        member.state = State.READY
        self._ready[seq.sequence_id] = member
        self.waiting.stir()

    def start(self, now: float) -> list[Sequence]:
        """Give places to those that are ready, and blocks to those whose turn it is; gives these."""
        while self._ready and self._rows.free_count:
            self._seat(self._ready.pop(next(iter(self._ready))))
        if not (self._rows.free_count or self.waiting.landing):
            return []  # whoever waits needs a row
        if not self.waiting.settle(self._engine.ledger.available):
            return []
        started: list[Sequence] = []
        self._refused = False
        for member in self._in_turn(now):
            if not self._has_place(member):
                if member.lands:
                    continue
                break  # whoever comes after it waits too, or newcomers that land would take each row that comes free
            if self._holdings.awaited(member.seq, whole_prompt=member.lands):
                continue
            if not self._start(member):
                self._refused = not member.spare
                break  # the same, so that none is starved by smaller ones
            started.append(member.seq)
        self.waiting.tried(self._engine.ledger.available)
        return started

    def _in_turn(self, now: float) -> list[Member]:
        """Those that wait, best first."""
        members = list(self.waiting)
        if len(members) < 2 or self._all_fit(members):
            return members
        if len(self._tenants) > 1:
            members = [member for member in self.ranked(now) if member.state is State.WAITING]
        else:
            members = self._turns.order(members, now)
        members.sort(key=lambda member: member.spare > 0)  # stable: the policy's order within both
        return members

    def _all_fit(self, members: list[Member]) -> bool:
        """There are places and blocks for all, whoever comes first."""
        if len(members) > self._rows.free_count or any(member.spare for member in members):
            return False
        needed = sum(self._holdings.blocks_for(member.seq.length) for member in members)
        return needed + len(self._rows.sequences) // 2 <= self._engine.ledger.available

    def _has_place(self, member: Member) -> bool:
        if member.lands:
            return self.running + len(self._reserved) + len(self._ready) < self._most
        return self._rows.free_count > 0

    def _start(self, member: Member) -> bool:
        """False: blocks are short. A newcomer leaves some to those that run, or it would be preempted again at once."""
        seq, spare = member.seq, member.spare + self.running // 2
        known = self._holdings.start(seq, spare, whole_prompt=member.lands, borrow=member.swapped is None)
        if known is None:
            return False
        self.waiting.remove(member)
        self._preemption.give_back(member, known)
        if member.lands:
            member.state = State.RESERVED
            self._reserved[seq.sequence_id] = member
        else:
            self._seat(member)
        return True

    def _seat(self, member: Member) -> None:
        seq = member.seq
        member.row = self._rows.take(seq, member.limit, chunked=member.chunked, borrows=self._holdings.borrows(seq))
        self._sampling.put(member.row, seq)
        member.state = State.RUNNING

    def ranked(self, now: float) -> list[Member]:
        """All that want to run or do, best first: where tenants share fairly, what one runs counts for its others."""
        members = [one for one in self._members.values() if one.state is not State.DONE]
        return self._turns.order(members, now)

    # Going

    def preempt(self, member: Member) -> None:
        """It gives its blocks back and waits; at once, or as soon as the step that has its row is over."""
        if self.is_flying(member):
            member.gives_back = True
            self._rows.runs[member.row] = False
            self._giving_back.append(member)
            return
        self._ready.pop(member.seq.sequence_id, None)
        self._free_row(member)
        self._preemption.take_blocks(member)
        member.state, member.gives_back = State.WAITING, False
        self.waiting.add(member)

    def finish(self, member: Member) -> None:
        """A prompt alone is computed: its row is free, its blocks stay until it leaves."""
        member.state = State.DONE
        if member.gives_back:  # it was to go back and wait, and has nothing left to wait for
            member.gives_back = False
            self._giving_back.remove(member)
        self._free_row(member)
        self.waiting.stir()

    def leave(self, member: Member) -> None:
        """The one way out. Its blocks come back now, or when the step that has its row is over."""
        key = member.seq.sequence_id
        del self._members[key]
        tenant = member.seq.tenant
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        self.waiting.remove(member)
        self._reserved.pop(key, None)
        self._ready.pop(key, None)
        self._preemption.drop(member)
        if member.gives_back:
            self._giving_back.remove(member)
        if self.is_flying(member):
            self._rows.live[member.row] = self._rows.runs[member.row] = False
            member.state = State.LEAVING
            self._leaving.append(member)
        else:
            self._free(member)

    def step_is_over(self) -> None:
        """Whose rows no step has any more go now."""
        for member in [member for member in self._leaving if not self.is_flying(member)]:
            self._leaving.remove(member)
            self._free(member)
        for member in [member for member in self._giving_back if not self.is_flying(member)]:
            self._giving_back.remove(member)
            self.preempt(member)

    def _free(self, member: Member) -> None:
        self._free_row(member)
        self._holdings.release(member.seq)
        self.waiting.stir()

    def _free_row(self, member: Member) -> None:
        if member.row >= 0:
            member.seq.computed = int(self._rows.computed[member.row])
            member.seq.charged = max(member.seq.charged, member.seq.computed)  # no token is charged for twice
            self._sampling.clear(member.row, member.seq)
            self._rows.give_back(member.row)
            member.row = -1

    # What is there

    @property
    def running(self) -> int:
        """Rows taken."""
        return self._engine.max_batch - self._rows.free_count

    @property
    def lacks_blocks(self) -> bool:
        """One waits that could start if there were more blocks."""
        return self._refused and len(self.waiting) > 0

    @property
    def blocks_may_come(self) -> bool:
        """Some hold blocks that they will give back or use before long: KV is on its way, or a step under way."""
        return bool(self._reserved or self._leaving or self._giving_back)

    @property
    def num_tenants(self) -> int:
        return len(self._tenants)

    @property
    def seatless(self) -> int:
        """Sequences that have no row yet."""
        return len(self.waiting) + len(self._reserved) + len(self._ready)

    def going(self) -> list[list[BlockId]]:
        """The blocks of those that give theirs when the steps under way are over."""
        return [member.seq.blocks for member in (*self._giving_back, *self._leaving)]

    def is_flying(self, member: Member) -> bool:
        """A step under way has its row."""
        return member.row >= 0 and self._rows.is_flying(member.row)

    @property
    def some_leave(self) -> bool:
        """A step under way may have rows whose sequences are over."""
        return bool(self._leaving)

    def preemptible(self) -> dict[int, Member]:
        """Whom a lack of blocks may put back: those with a row by its number, ready ones by numbers behind."""
        running = {
            member.row: member
            for member in self._members.values()
            if member.state is State.RUNNING and not member.gives_back
        }
        return running | dict(enumerate(self._ready.values(), self._engine.max_batch))

    def holders(self) -> Iterable[Holder]:
        """Each that holds blocks, but for reserved ones: these are whoever's lands them."""
        for member in (*self._members.values(), *self._leaving):
            seq = member.seq
            if seq.blocks and member.state is not State.RESERVED:
                tokens = seq.computed if member.row < 0 else int(self._rows.computed[member.row])
                state = member.state.name.lower()
                yield Holder(sequence_id=seq.sequence_id, state=state, block_ids=seq.blocks, tokens=tokens)
        for blocks in self._engine.prefix_cache.pins():
            tokens = len(blocks) * self._engine.geometry.block_tokens
            yield Holder(sequence_id=SequenceId(""), state=PINNED, block_ids=blocks, tokens=tokens)
