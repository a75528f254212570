"""Who runs first: scheduling policies, by name. Pure: no clock, no ledger, no device.

A policy ranks all sequences that want to run, those that run already among them, by a key for each, smallest first:

    (-class, round, due, arrived, sequence id)

Parts that a policy does not look at are zero. Keys end in arrival and id, so an order is total and the same for the
same candidates however they are listed. It serves both ways: who joins is taken from its beginning, who is preempted
from its end, so the first of all is never preempted and something always gets on.

`now` and `arrived` are seconds on one clock. docs/scheduling.md tells what each policy promises.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..core.ids import SequenceId
from .accounts import INPUT_WEIGHT, OUTPUT_WEIGHT, Accounts

AGING = 200.0
"""Cost per second: how much shorter a sequence counts for each second that it has waited."""

LONGEST = 6_000.0
"""Cost. Longer ones count as this long: 30 s of waiting make up for any length, however wrong a prediction is."""

CLASS_S = 10.0
"""Seconds of waiting that lift a sequence by one class, up to the highest that is there."""

MOST_PRIORITY = 5
"""Priorities beyond it, either way, count as it: 100 s of waiting make up for any priority."""

QUANTUM = 1_024.0
"""Cost that a tenant is served before the next tenant's turn, about 500 tokens of answers. Smaller is smoother; larger
moves sequences in and out of memory less often when not all fit."""

Key = tuple[int, float, float, float, SequenceId]
"""(-class, round, due, arrived, sequence id)"""


class Candidate(NamedTuple):
    """What a policy may know of a sequence that wants to run. Thousands are made for one order: so a plain tuple."""

    sequence_id: SequenceId
    arrived: float  # s on the caller's clock; a preemption does not change it
    priority: int  # larger first
    tenant: str
    tokens_ahead: int  # prompt tokens still to compute
    predicted_tokens: int  # of its answer, still to come


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    keys: Callable[[Sequence[Candidate], float, Accounts], list[Key]]  # one each, in any order

    def order(self, candidates: Sequence[Candidate], now: float, accounts: Accounts) -> list[SequenceId]:
        """All of them, who goes first first."""
        return [key[-1] for key in sorted(self.keys(candidates, now, accounts))]


def fcfs_keys(candidates: Sequence[Candidate], now: float, accounts: Accounts) -> list[Key]:
    """First come, first served: (0, 0, 0, arrived, id)."""
    return [(0, 0.0, 0.0, c.arrived, c.sequence_id) for c in candidates]


def sjf_keys(
    candidates: Sequence[Candidate], now: float, accounts: Accounts, *, aging: float = AGING, longest: float = LONGEST
) -> list[Key]:
    """Shortest predicted job first, with aging: (0, 0, due, arrived, id), due = arrived + predicted cost / aging.

    Ranks as `cost - aging * (now - arrived)` would, which changes with time for all alike. None is overtaken by one
    that comes longest / aging seconds after it, or later.
    """
    due = _due(candidates, _costs(candidates), aging, longest)
    return [(0, 0.0, at, c.arrived, c.sequence_id) for at, c in zip(due, candidates, strict=True)]


def priority_keys(
    candidates: Sequence[Candidate], now: float, accounts: Accounts, *, class_s: float = CLASS_S
) -> list[Key]:
    """Priority classes with aging, first come first served within one: (-class, 0, 0, arrived, id).

    None is overtaken by one that comes class_s seconds, for each class between the two, after it, or later.
    """
    classes = _classes(candidates, now, class_s)
    return [(-of, 0.0, 0.0, c.arrived, c.sequence_id) for of, c in zip(classes, candidates, strict=True)]


def fair_keys(
    candidates: Sequence[Candidate], now: float, accounts: Accounts, *, quantum: float = QUANTUM
) -> list[Key]:
    """Token-cost deficit round robin between tenants, first come first served within: (0, round, 0, arrived, id)."""
    costs = _costs(candidates)
    own: list[_Own] = [
        (0, 0.0, c.arrived, c.sequence_id, c.tenant, cost) for cost, c in zip(costs, candidates, strict=True)
    ]
    return _in_rounds(own, accounts, quantum)


def hybrid_keys(
    candidates: Sequence[Candidate],
    now: float,
    accounts: Accounts,
    *,
    aging: float = AGING,
    longest: float = LONGEST,
    class_s: float = CLASS_S,
    quantum: float = QUANTUM,
) -> list[Key]:
    """Classes as of `priority`, fair between the tenants of a class, a tenant's own as of `sjf`. The exact key:

    -class   class: priority, within +-MOST_PRIORITY, and one more for each class_s seconds of waiting; at most the
             highest priority among the candidates. So where all have one priority, age changes nothing between tenants
    round    (its tenant's level + cost of the tenant's candidates before it, by class, due, arrival, id) // quantum
    due      arrived + min(predicted cost, longest) / aging
    arrived, sequence id
    """
    costs = _costs(candidates)
    classes = _classes(candidates, now, class_s)
    due = _due(candidates, costs, aging, longest)
    own: list[_Own] = [
        (-of, at, c.arrived, c.sequence_id, c.tenant, cost)
        for of, at, cost, c in zip(classes, due, costs, candidates, strict=True)
    ]
    return _in_rounds(own, accounts, quantum)


_Own = tuple[int, float, float, SequenceId, str, int]
"""(-class, due, arrived, sequence id | tenant, cost): sorted, how each tenant would order its own."""


def _costs(candidates: Sequence[Candidate]) -> list[int]:
    """Of what each has still to come; `cost` written out, as a call for each would take as long as all the rest."""
    return [INPUT_WEIGHT * c.tokens_ahead + OUTPUT_WEIGHT * c.predicted_tokens for c in candidates]


def _due(candidates: Sequence[Candidate], costs: Sequence[int], aging: float, longest: float) -> list[float]:
    """When a sequence of no length would have to come to rank beside each."""
    return [
        c.arrived + (cost if cost < longest else longest) / aging for cost, c in zip(costs, candidates, strict=True)
    ]


def _classes(candidates: Sequence[Candidate], now: float, class_s: float) -> list[int]:
    """One each. Capped, so that those who have waited long are equals, and not a tenant's backlog above all others."""
    lowest = {priority: max(priority, -MOST_PRIORITY) for priority in {c.priority for c in candidates}}
    top = min(max(lowest.values(), default=0), MOST_PRIORITY)
    if len(lowest) < 2:
        return [top] * len(candidates)
    lifted = [lowest[c.priority] + int((now - c.arrived) / class_s) for c in candidates]
    return [of if of < top else top for of in lifted]


def _in_rounds(own: list[_Own], accounts: Accounts, quantum: float) -> list[Key]:
    """A tenant's first is in the round that the tenant has reached, and each further one where it will be when those
    before it have been served. So several places that come free at once go to several tenants.
    """
    levels: dict[str, float] = {}
    keys: list[Key] = []
    for minus_class, due, arrived, sequence_id, tenant, cost in sorted(own):
        level = levels[tenant] if tenant in levels else accounts.level(tenant)
        keys.append((minus_class, level // quantum, due, arrived, sequence_id))
        levels[tenant] = level + cost
    return keys


DEFAULT_POLICY = "hybrid"

POLICIES: dict[str, Policy] = {
    each.name: each
    for each in (
        Policy("fcfs", fcfs_keys),
        Policy("sjf", sjf_keys),
        Policy("priority", priority_keys),
        Policy("fair", fair_keys),
        Policy("hybrid", hybrid_keys),
    )
}


def policy(name: str) -> Policy:
    """Raises ValueError, with the names there are, for another one."""
    if name not in POLICIES:
        raise ValueError(f"no policy is named {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name]
