"""No sequence waits forever, whoever else comes: one place, and an adversary that sends more each round.

Constants are small here, so that bounds are too: the policies are the same functions of them. A round is a second.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.ids import SequenceId
from baton.engine.accounts import Accounts
from baton.engine.policies import (
    MOST_PRIORITY,
    Candidate,
    Key,
    Policy,
    fair_keys,
    fcfs_keys,
    hybrid_keys,
    priority_keys,
    sjf_keys,
)

from .one_place import AGAIN, ALONE, ANSWER, CHUNK, CROWD, LARGEST_COST, PROMPT, Job, OnePlace

AGING, LONGEST = 2.0, 40.0
CLASS_S = 4.0
QUANTUM = 16.0
MOST_DEBT = 64.0

FCFS = Policy("fcfs", fcfs_keys)
SJF = Policy("sjf", partial(sjf_keys, aging=AGING, longest=LONGEST))
PRIORITY = Policy("priority", partial(priority_keys, class_s=CLASS_S))
FAIR = Policy("fair", partial(fair_keys, quantum=QUANTUM))
HYBRID = Policy("hybrid", partial(hybrid_keys, aging=AGING, longest=LONGEST, class_s=CLASS_S, quantum=QUANTUM))

# Once nobody who comes later can go ahead, all that are there run out, each with its KV lost once.
RUN_OUT = CROWD * (ALONE + AGAIN)
LEAD = LONGEST / AGING  # rounds
CLASSES = 2 * MOST_PRIORITY * CLASS_S  # rounds from the lowest class to the highest

# All of a tenant's own ahead of it, at the level where the tenant's debt lets it begin: the floor passes that level and
# the round it is in when everybody's share is that much. Then those still below it catch up.
_OWN = MOST_DEBT + CROWD * LARGEST_COST + QUANTUM
_OTHERS = MOST_DEBT + QUANTUM + CHUNK
IN_TURN = CROWD * (_OWN + _OTHERS) * (1 + AGAIN)  # rounds: each turn costs at least 1 and loses at most AGAIN

BOUNDS = {
    FCFS: RUN_OUT,
    SJF: LEAD + RUN_OUT,
    PRIORITY: CLASSES + RUN_OUT,
    FAIR: IN_TURN,
    HYBRID: max(CLASSES, LEAD) + IN_TURN,
}

Keys = Callable[[Sequence[Candidate], float, Accounts], list[Key]]

jobs = st.builds(
    Job,
    st.just(SequenceId("")),
    st.just(0),
    st.sampled_from([0, 1, -1, 10**9, -(10**9)]),
    st.sampled_from(["", "a", "b"]),  # "": a tenant never seen before
    st.integers(1, PROMPT),
    st.integers(1, ANSWER),
    st.sampled_from([0, 1, 3, 100]),
)
rounds = st.lists(st.lists(jobs, max_size=2), min_size=1, max_size=6)


def job(priority: int = 0, tenant: str = "", prompt: int = 1, answer: int = 1) -> Job:
    return Job(SequenceId(""), 0, priority, tenant, prompt, answer, predicted=answer)


def waited(server: OnePlace, victim: Job, adversary: Sequence[Sequence[Job]], bound: float) -> int | None:
    """Rounds from the victim's arrival to its end, the adversary's arrivals over and over; None when beyond `bound`."""
    ours = server.arrive(victim)
    while ours is None:
        server.step()
        ours = server.arrive(victim)
    for count in range(int(bound)):
        server.step(adversary[count % len(adversary)])
        if ours.ended:
            return count + 1
    return None


@pytest.mark.parametrize("preempts", [True, False], ids=["preempting", "to the end"])
@pytest.mark.parametrize("policy", BOUNDS, ids=lambda policy: policy.name)
@settings(max_examples=100, deadline=None)
@given(before=rounds, warm_up=st.integers(0, 60), victim=jobs, adversary=rounds)
def test_every_sequence_ends_within_a_bound_whatever_else_comes(
    policy: Policy, preempts: bool, before: list[list[Job]], warm_up: int, victim: Job, adversary: list[list[Job]]
) -> None:
    server = OnePlace(policy, Accounts(most_debt=MOST_DEBT), preempts=preempts)
    for count in range(warm_up):
        server.step(before[count % len(before)])
    assert waited(server, victim, adversary, BOUNDS[policy]) is not None


def shortest_without_aging(candidates: Sequence[Candidate], now: float, accounts: Accounts) -> list[Key]:
    return [(0, 0.0, float(c.tokens_ahead + c.predicted_tokens), c.arrived, c.sequence_id) for c in candidates]


def priority_without_aging(candidates: Sequence[Candidate], now: float, accounts: Accounts) -> list[Key]:
    return [(-c.priority, 0.0, 0.0, c.arrived, c.sequence_id) for c in candidates]


SHORT = [[job(prompt=1, answer=1), job(prompt=1, answer=1)]]
URGENT = [[job(priority=1), job(priority=1)]]


@pytest.mark.parametrize(
    ("without", "with_aging", "victim", "adversary"),
    [
        (shortest_without_aging, SJF, job(prompt=16, answer=6), SHORT),
        (shortest_without_aging, HYBRID, job(prompt=16, answer=6), SHORT),
        (priority_without_aging, PRIORITY, job(priority=0), URGENT),
        (priority_without_aging, HYBRID, job(priority=0), URGENT),
    ],
)
def test_without_aging_the_same_adversary_starves_it(
    without: Keys, with_aging: Policy, victim: Job, adversary: list[list[Job]]
) -> None:
    bound = BOUNDS[with_aging]
    assert waited(OnePlace(with_aging, Accounts(most_debt=MOST_DEBT)), victim, adversary, bound) is not None
    starving = OnePlace(Policy("strict", without), Accounts(most_debt=MOST_DEBT))
    assert waited(starving, victim, adversary, bound) is None


def lifted_to_the_least_served(accounts: Accounts, costs: dict[str, float], waiting: set[str]) -> Accounts:
    """As `Accounts.charged`, but the floor is the level of the least served that waits, and no more."""
    levels = {tenant: accounts.level(tenant) for tenant in {*costs, *waiting, *accounts.levels}}
    levels |= {tenant: levels[tenant] + charge for tenant, charge in costs.items()}
    floor = min((levels[tenant] for tenant in waiting), default=max(levels.values()))
    return Accounts(floor=floor, levels={t: level for t, level in levels.items() if level > floor or t in waiting})


def test_if_new_tenants_did_not_begin_at_a_rising_floor_they_would_starve_one_served_before() -> None:
    adversary = [[job(), job()]]  # a tenant never seen before each time

    def served_before(server: OnePlace) -> OnePlace:
        server.step([*adversary[0], *adversary[0]])
        return server

    levels = {"served": 2 * QUANTUM}
    ours = served_before(OnePlace(FAIR, Accounts(levels=levels, most_debt=MOST_DEBT)))
    assert waited(ours, job(tenant="served"), adversary, BOUNDS[FAIR]) is not None
    starving = served_before(OnePlace(FAIR, Accounts(levels=levels), charge=lifted_to_the_least_served))
    assert waited(starving, job(tenant="served"), adversary, BOUNDS[FAIR]) is None


@pytest.mark.parametrize("policy", [FAIR, HYBRID], ids=lambda policy: policy.name)
@pytest.mark.parametrize("preempts", [True, False], ids=["preempting", "to the end"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_two_tenants_that_always_wait_are_served_differs_by_a_quantum_and_a_job_at_most(
    policy: Policy, preempts: bool, data: st.DataObject
) -> None:
    sizes = st.lists(st.tuples(st.integers(1, PROMPT), st.integers(1, ANSWER)), min_size=1, max_size=4)
    of = {"a": data.draw(sizes), "b": data.draw(sizes), "": data.draw(sizes)}
    others_come_every = data.draw(st.integers(1, 30))
    server = OnePlace(policy, Accounts(), preempts=preempts)
    for count in range(400):
        for tenant in "ab":
            while sum(each.tenant == tenant for each in server.jobs.values()) < 2:
                server.arrive(job(0, tenant, *of[tenant][count % len(of[tenant])]))
        server.step([job(0, "", *of[""][count % len(of[""])])] if count % others_come_every == 0 else [])
        apart = abs(server.served.get("a", 0) - server.served.get("b", 0))
        assert apart <= QUANTUM + (CHUNK if preempts else LARGEST_COST)
