"""What each tenant has been served, in token cost, so that a policy can share fairly between them.

Deficit round robin (Shreedhar, Varghese: Efficient Fair Queuing Using Deficit Round Robin, SIGCOMM 1995) with what an
answer costs known only as it grows: a tenant that runs over its quantum starts that much later in its next rounds.
A tenant that is new or was idle begins at the level of the others, so that idleness earns no credit (Sheng et al.:
Fairness in Serving Large Language Models, OSDI 2024). That level also rises with all that is served, as the virtual
time of fair queueing does (Demers, Keshav, Shenker, SIGCOMM 1989): else an endless row of new tenants could keep one
that has been served a little more waiting forever.
"""

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

INPUT_WEIGHT = 1
"""Cost of a prompt token that is computed; one found in the prefix cache costs nothing."""

OUTPUT_WEIGHT = 2
"""Cost of an answer's token. A prompt's tokens go through the model together, an answer's one by one, each in a step of
its own that reads its whole context: dearer, and by how much depends on model and batch. Twice is what Sheng et al.
take, after prices. Costs only have to be the same for all."""

MOST_DEBT = 32_768.0
"""Cost. How far a tenant's level may lie from the floor, either way: what is longer past is forgiven."""

MOST_DEBTORS = 1_024
"""Tenants without waiting sequences that are remembered; beyond, those least in debt are forgiven."""


def cost(input_tokens: int, output_tokens: int) -> int:
    return INPUT_WEIGHT * input_tokens + OUTPUT_WEIGHT * output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounts:
    """A level for each tenant: the cost that it has been served, as if it had had its share all along.

    Only tenants that wait, or are above the floor, are remembered: all others are at the floor.
    """

    floor: float = 0.0  # never falls
    levels: dict[str, float] = field(default_factory=dict)  # of the remembered; nobody changes it
    most_debt: float = MOST_DEBT

    def level(self, tenant: str) -> float:
        """The lower, the sooner a fair policy serves it."""
        return self.levels.get(tenant, self.floor)

    @property
    def even(self) -> bool:
        """All are at the floor."""
        return all(level == self.floor for level in self.levels.values())

    def charged(self, costs: Mapping[str, float], waiting: Collection[str]) -> "Accounts":
        """The accounts after a step. Takes time by the tenants that take part or are in debt, not by all there were.

        costs: what the step has served each tenant. Each token is charged once, when it is first computed: work that
        is done again after a preemption is not, else two tenants could preempt one another forever, each using up its
        quantum by catching up.
        waiting: tenants with a sequence that wants to run and does not. One whose sequences all run lacks nothing, so
        it gathers no credit.
        """
        levels = {tenant: self.level(tenant) + charge for tenant, charge in costs.items()}
        if not waiting:  # nobody lacked anything, so nobody owes anything
            return replace(self, floor=max(self.floor, *levels.values()) if levels else self.floor, levels={})
        for tenant in waiting:
            levels.setdefault(tenant, self.level(tenant))
        share = sum(costs.values()) / len(levels)
        floor = max(self.floor + share, min(levels[tenant] for tenant in waiting))
        debtors = {t: level for t, level in (self.levels | levels).items() if level > floor and t not in waiting}
        if len(debtors) > MOST_DEBTORS:
            debtors = dict(heapq.nlargest(MOST_DEBTORS, debtors.items(), key=lambda entry: (entry[1], entry[0])))
        kept = debtors | {tenant: levels[tenant] for tenant in waiting}
        low, high = floor - self.most_debt, floor + self.most_debt
        return replace(self, floor=floor, levels={t: min(max(level, low), high) for t, level in kept.items()})
