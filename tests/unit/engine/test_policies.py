"""Each policy's order on plain lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.ids import SequenceId
from baton.engine.accounts import Accounts
from baton.engine.policies import (
    AGING,
    CLASS_S,
    DEFAULT_POLICY,
    LONGEST,
    MOST_PRIORITY,
    POLICIES,
    QUANTUM,
    Candidate,
    policy,
)


def a(
    name: str, arrived: float = 0.0, *, priority: int = 0, tenant: str = "t", prompt: int = 0, answer: int = 0
) -> Candidate:
    return Candidate(
        sequence_id=SequenceId(name),
        arrived=arrived,
        priority=priority,
        tenant=tenant,
        tokens_ahead=prompt,
        predicted_tokens=answer,
    )


def order(name: str, *candidates: Candidate, now: float = 0.0, accounts: Accounts | None = None) -> str:
    return " ".join(policy(name).order(candidates, now, accounts or Accounts()))


candidates = st.builds(
    a,
    st.just(""),
    st.sampled_from([0.0, 1.0, 7.5, 20.0]),
    priority=st.integers(-9, 9),
    tenant=st.sampled_from("abc"),
    prompt=st.integers(0, 10_000),
    answer=st.integers(0, 10_000),
)
crowds = st.lists(candidates, max_size=12).map(
    lambda them: [
        a(
            f"{index}",
            c.arrived,
            priority=c.priority,
            tenant=c.tenant,
            prompt=c.tokens_ahead,
            answer=c.predicted_tokens,
        )
        for index, c in enumerate(them)
    ]
)
levels = st.builds(
    lambda floor, above: Accounts(floor=floor, levels={tenant: floor + cost for tenant, cost in above.items()}),
    st.floats(0, 1e12),
    st.dictionaries(st.sampled_from("abc"), st.floats(-5_000, 5_000)),
)


def test_a_policy_of_another_name_is_refused_by_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="'lifo'; there are fcfs, sjf, priority, fair, hybrid"):
        policy("lifo")
    assert all(policy(name).name == name for name in POLICIES)
    assert DEFAULT_POLICY in POLICIES


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data(), crowd=crowds, accounts=levels, now=st.sampled_from([20.0, 31.0, 500.0]))
def test_an_order_has_all_once_and_does_not_depend_on_how_they_are_listed(
    name: str, data: st.DataObject, crowd: list[Candidate], accounts: Accounts, now: float
) -> None:
    expected = policy(name).order(crowd, now, accounts)
    assert sorted(expected) == sorted(c.sequence_id for c in crowd)
    assert policy(name).order(data.draw(st.permutations(crowd)), now, accounts) == expected


@pytest.mark.parametrize("name", POLICIES)
def test_equals_go_by_arrival_then_by_id(name: str) -> None:
    assert order(name, a("3", 1.0), a("2", 1.0), a("1", 2.0), now=2.0) == "2 3 1"


def test_fcfs_looks_at_arrival_alone() -> None:
    assert order("fcfs", a("late", 2.0, priority=5), a("first", 0.0, answer=999), a("next", 1.0)) == "first next late"


def test_sjf_takes_the_shortest_of_those_that_came_together() -> None:
    assert order("sjf", a("long", answer=500), a("short", answer=5), a("prompt", prompt=900)) == "short prompt long"


def test_a_token_to_write_counts_as_two_to_read() -> None:
    assert order("sjf", a("write", answer=501), a("read", prompt=1_001)) == "read write"
    assert order("sjf", a("write", answer=500), a("read", prompt=1_001)) == "write read"


def test_sjf_sets_waiting_against_length() -> None:
    long = a("long", 0.0, answer=1_000)
    lead = 2_000 / AGING  # seconds
    assert order("sjf", long, a("short", lead - 0.1)) == "short long"
    assert order("sjf", long, a("short", lead + 0.1)) == "long short"


def test_no_length_is_overtaken_by_those_that_come_later_than_the_longest_lead() -> None:
    assert order("sjf", a("endless", 0.0, answer=10**9), a("short", LONGEST / AGING)) == "endless short"


def test_the_higher_priority_goes_first_and_arrival_decides_within_a_class() -> None:
    crowd = [a("low", 0.0, priority=-1), a("b", 2.0, priority=1), a("a", 1.0, priority=1), a("normal", 0.0)]
    assert order("priority", *crowd, now=3.0) == "a b normal low"


def test_waiting_lifts_by_one_class_every_so_many_seconds() -> None:
    old = a("old", 0.0)
    assert order("priority", old, a("new", CLASS_S - 1, priority=1), now=CLASS_S - 0.5) == "new old"
    assert order("priority", old, a("new", CLASS_S - 1, priority=1), now=CLASS_S) == "old new"
    assert order("priority", old, a("new", CLASS_S, priority=2), now=CLASS_S) == "new old"


def test_a_priority_beyond_the_most_counts_as_the_most() -> None:
    low, high = a("low", 0.0, priority=-(10**9)), 10**9
    lead = 2 * MOST_PRIORITY * CLASS_S
    assert order("priority", low, a("high", lead - 1, priority=high), now=lead - 1) == "high low"
    assert order("priority", low, a("high", lead, priority=high), now=lead) == "low high"


def test_fair_takes_the_tenant_that_was_served_less_by_a_round() -> None:
    accounts = Accounts(levels={"rich": QUANTUM})
    assert order("fair", a("1", 0.0, tenant="rich"), a("2", 9.0, tenant="poor"), accounts=accounts) == "2 1"


def test_fair_looks_at_arrival_within_a_round() -> None:
    accounts = Accounts(levels={"rich": QUANTUM - 1})
    assert order("fair", a("1", 0.0, tenant="rich"), a("2", 9.0, tenant="poor"), accounts=accounts) == "1 2"


def test_fair_gives_places_that_come_free_at_once_to_several_tenants() -> None:
    turn = int(QUANTUM)
    crowd = [a(f"A{i}", float(i), tenant="A", prompt=turn) for i in range(3)]
    crowd += [a(f"B{i}", 10.0 + i, tenant="B", prompt=turn) for i in range(3)]
    assert order("fair", *crowd) == "A0 B0 A1 B1 A2 B2"


def test_fair_keeps_a_tenant_s_own_in_the_order_of_arrival() -> None:
    assert order("fair", a("long", 0.0, answer=5_000), a("short", 1.0, answer=1)) == "long short"


def test_hybrid_looks_at_class_then_tenant_then_length() -> None:
    accounts = Accounts(levels={"rich": 9 * QUANTUM})
    crowd = [
        a("urgent", priority=1, tenant="rich", answer=900),
        a("rich short", tenant="rich", answer=1),
        a("poor long", tenant="poor", answer=900),
        a("poor short", tenant="poor", answer=1),
    ]
    assert order("hybrid", *crowd, accounts=accounts) == "urgent poor short poor long rich short"


def test_under_hybrid_a_backlog_s_age_counts_for_nothing_against_other_tenants_of_its_class() -> None:
    accounts = Accounts(levels={"flood": QUANTUM})
    crowd = [a("flood 1", 0.0, tenant="flood"), a("flood 2", 0.0, tenant="flood"), a("other", 900.0, tenant="other")]
    assert order("hybrid", *crowd, now=900.0, accounts=accounts) == "other flood 1 flood 2"


def test_under_hybrid_a_low_class_is_lifted_among_the_high_and_no_further() -> None:
    accounts = Accounts(levels={"old": QUANTUM})
    high = a("high", 2 * CLASS_S, priority=1, tenant="new")
    assert order("hybrid", a("low", 0.0, tenant="old"), high, now=9 * CLASS_S, accounts=accounts) == "high low"
    assert order("hybrid", a("low", 0.0, tenant="x"), high, now=9 * CLASS_S, accounts=accounts) == "low high"
