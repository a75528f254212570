"""Who waits for blocks, and whose turn it is."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from ..core.ids import SequenceId
from .accounts import Accounts
from .length_predictor import LengthPredictor
from .members import Member
from .policies import Candidate, Policy


class Turns:
    """Orders sequences by a policy: those that wait, and, when blocks are short, those that run."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._predictor = LengthPredictor()
        self._accounts = Accounts()

    def order(self, members: Iterable[Member], now: float) -> list[Member]:
        """Best first."""
        by_id = {member.seq.sequence_id: member for member in members}
        candidates = [self._candidate(member) for member in by_id.values()]
        return [by_id[key] for key in self._policy.order(candidates, now, self._accounts)]

    def charge(self, costs: Mapping[str, float], waiting: Collection[str]) -> None:
        """What one step has done for each tenant. waiting: tenants with a sequence that wants to run and does not."""
        self._accounts = self._accounts.charged(costs, waiting)

    @property
    def even(self) -> bool:
        """No tenant is owed anything, and none owes."""
        return self._accounts.even

    def ended(self, member: Member) -> None:
        """An answer is complete: the next ones are predicted from it."""
        self._predictor.ended(member.seq.tenant, len(member.seq.tokens))

    def _candidate(self, member: Member) -> Candidate:
        seq = member.seq
        return Candidate(
            sequence_id=seq.sequence_id,
            arrived=member.arrived,
            priority=seq.priority,
            tenant=seq.tenant,
            tokens_ahead=max(len(seq.prompt) - max(seq.computed, member.swapped_tokens), 0),
            predicted_tokens=self._predictor.remaining(seq.tenant, len(seq.tokens), seq.sampling.max_tokens),
        )


class WaitingList:
    """Sequences that hold no block, by id. Says when looking through them again could help."""

    def __init__(self) -> None:
        self._members: dict[SequenceId, Member] = {}
        self._stirred = True
        self._available = 0
        self.tokens = 0  # of their prompts that are to be computed here
        self.tenants: Counter[str] = Counter()
        self.landing = 0  # of them, that need no row to start

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def add(self, member: Member) -> None:
        self._members[member.seq.sequence_id] = member
        self._stirred = True
        self.tokens += member.tokens_ahead
        self.tenants[member.seq.tenant] += 1
        self.landing += member.lands

    def remove(self, member: Member) -> None:
        """Of one that does not wait: nothing."""
        if self._members.pop(member.seq.sequence_id, None) is not None:
            self.tokens -= member.tokens_ahead
            self.landing -= member.lands
            tenant = member.seq.tenant
            self.tenants[tenant] -= 1
            if not self.tenants[tenant]:
                del self.tenants[tenant]

    def stir(self) -> None:
        """A place has come free, or a prompt's blocks have become known."""
        self._stirred = True

    def settle(self, available: int) -> bool:
        """Whether one may start that could not at the last try. available: blocks, some of which may have come back
        without our knowing: loans and reservations give theirs back themselves."""
        may = bool(self._members) and (self._stirred or available > self._available)
        self._stirred = False
        return may

    def tried(self, available: int) -> None:
        """Those that still wait can't start with so many blocks."""
        self._available = available
