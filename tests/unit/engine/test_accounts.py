"""Levels: what a tenant has been served, without credit for idleness."""

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.accounts import MOST_DEBTORS, Accounts, cost


def test_a_token_to_write_costs_two_to_read() -> None:
    assert cost(10, 0) == 10
    assert cost(3, 5) == 13


def test_a_tenant_that_is_new_begins_at_the_level_of_the_others() -> None:
    accounts = Accounts()
    for _ in range(10):
        accounts = accounts.charged({"a": 100, "b": 100}, {"a", "b"})
    assert accounts.level("new") == accounts.level("a") == accounts.level("b") == 1_000


def test_idleness_earns_no_credit() -> None:
    accounts = Accounts().charged({"idle": 10, "a": 10, "b": 10}, {"a", "b"})
    for _ in range(10):
        accounts = accounts.charged({"a": 100, "b": 100}, {"a", "b"})
    assert accounts.level("idle") == accounts.level("a")
    assert "idle" not in accounts.levels


def test_one_whose_sequences_all_run_gathers_no_credit_though_it_is_served_less() -> None:
    accounts = Accounts()
    for _ in range(100):
        accounts = accounts.charged({"steady": 1, "busy": 100}, {"busy"})
    assert accounts.level("steady") == accounts.level("busy")


def test_what_was_served_beyond_a_share_is_remembered_until_the_others_have_had_as_much() -> None:
    accounts = Accounts().charged({"a": 1_000}, {"b"})
    assert accounts.level("a") - accounts.level("b") == 1_000
    for _ in range(9):
        accounts = accounts.charged({"b": 100}, {"b", "c"})
    assert accounts.level("a") > accounts.floor
    for _ in range(20):
        accounts = accounts.charged({"b": 100}, {"b", "c"}).charged({"c": 100}, {"b", "c"})
    assert "a" not in accounts.levels


def test_when_nobody_waits_nobody_owes_anything() -> None:
    accounts = Accounts().charged({"a": 1_000}, {"b"}).charged({"a": 1, "b": 1}, set())
    assert not accounts.levels
    assert accounts.level("a") == accounts.level("b") == 1_001


def test_a_debt_longer_past_than_the_most_is_forgiven_and_so_is_a_lack() -> None:
    accounts = Accounts(most_debt=50.0)
    for _ in range(10):
        accounts = accounts.charged({"a": 100}, {"b"})
    assert accounts.level("a") == accounts.floor + 50
    assert accounts.level("b") == accounts.floor - 50


def test_tenants_that_come_once_and_go_are_not_all_remembered() -> None:
    accounts = Accounts()
    for index in range(3 * MOST_DEBTORS):
        accounts = accounts.charged({f"once {index}": 10}, {"waits"})
    assert len(accounts.levels) <= MOST_DEBTORS + 1


def test_of_too_many_debtors_those_least_in_debt_are_forgiven() -> None:
    costs = {f"tenant {index}": 10_000.0 + index for index in range(MOST_DEBTORS + 2)}
    waiting = {f"waits {index}" for index in range(3 * MOST_DEBTORS)}
    accounts = Accounts().charged(costs, waiting)
    assert accounts.levels.keys() - waiting == costs.keys() - {"tenant 0", "tenant 1"}


tenants = st.sampled_from("abcd")
steps = st.lists(st.tuples(st.dictionaries(tenants, st.integers(0, 1_000)), st.sets(tenants)), max_size=40)


@given(steps, st.sampled_from([100.0, 1e9]))
def test_the_floor_never_falls_and_no_level_is_further_from_it_than_the_most(
    each: list[tuple[dict[str, float], set[str]]], most_debt: float
) -> None:
    accounts = Accounts(most_debt=most_debt)
    for costs, waiting in each:
        after = accounts.charged(costs, waiting)
        assert after.floor >= accounts.floor
        assert all(abs(level - after.floor) <= most_debt + 1e-6 for level in after.levels.values())
        accounts = after


@given(steps)
def test_forgetting_loses_nothing_that_counts(each: list[tuple[dict[str, float], set[str]]]) -> None:
    """Beside accounts that keep every tenant and lift those below the floor that do not wait."""
    accounts = Accounts(most_debt=1e9)
    levels = dict.fromkeys("abcd", 0.0)
    floor = 0.0
    for costs, waiting in each:
        for tenant, charge in costs.items():
            levels[tenant] += charge
        taking_part = costs.keys() | waiting
        if not waiting:
            floor = max([floor, *(levels[tenant] for tenant in taking_part)])
            levels = dict.fromkeys("abcd", floor)
        else:
            floor = max(floor + sum(costs.values()) / len(taking_part), min(levels[tenant] for tenant in waiting))
            levels = {t: level if t in waiting else max(level, floor) for t, level in levels.items()}
        accounts = accounts.charged(costs, waiting)
        assert accounts.floor == floor
        assert {tenant: accounts.level(tenant) for tenant in "abcd"} == levels
