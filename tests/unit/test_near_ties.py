"""The rule for near-ties excuses what rounding may decide, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.request import Sampling

from ..near_ties import DRAWN_EPSILON, EPSILON, NearTies, choosable, chosen, filtered, number_of

LOGITS = [1.0, 5.0, 5.0 - EPSILON / 2, 4.0, 5.0 - EPSILON * 2]


def at_boundary(distance: float) -> tuple[list[float], Sampling]:
    """Two tokens, the boundary between them so far above the number that is drawn first."""
    sampling = Sampling(max_tokens=1, seed=7)
    share = number_of(sampling, 0) + distance
    assert share > 0.5  # so the first is the best
    return [float(np.log(share)), float(np.log(1 - share))], sampling


def test_greedy_answers_may_differ_where_both_tokens_are_as_good_as_the_best() -> None:
    ties = NearTies()
    ties.compare("one", [3, 2, 9], [3, 1, 8], lambda _: LOGITS)
    ties.compare("same", [3], [3], lambda _: LOGITS)
    assert len(ties.found) == 1
    ties.report("two answers", most=1)
    with pytest.raises(AssertionError):
        ties.report("two answers", most=0)


@pytest.mark.parametrize("token", [0, 3, 4])
def test_no_other_token_of_a_greedy_answer_is_excused(token: int) -> None:
    with pytest.raises(AssertionError, match="no near-tie"):
        NearTies().compare("one", [token], [1], lambda _: LOGITS)


def test_an_answer_that_breaks_off_is_no_near_tie() -> None:
    for tokens, expected in (([1], [1, 2]), ([1, 2], [1]), ([1], [2, 2])):
        with pytest.raises(AssertionError, match=r"has \d tokens"):
            NearTies().compare("one", tokens, expected, lambda _: LOGITS)


def test_drawn_tokens_may_differ_where_the_number_lies_at_their_boundary() -> None:
    for distance in (-0.5, 0.5):
        values, sampling = at_boundary(distance * DRAWN_EPSILON)
        assert choosable(np.array(values), sampling, 0) == {0, 1}
    for distance in (-3, 3):
        values, sampling = at_boundary(distance * DRAWN_EPSILON)
        assert choosable(np.array(values), sampling, 0) == {
            int(np.argmin(values) if distance < 0 else np.argmax(values))
        }


def test_drawn_tokens_may_differ_where_a_filters_edge_decides() -> None:
    """The last token is let in or not: its share is so large that the number then falls on another."""
    values = np.log([0.5, 0.3, 0.2])
    for name, edge in (("top_p", 0.8), ("min_p", 0.4)):
        for seed in range(20):
            near, far = (Sampling(max_tokens=1, seed=seed, **{name: edge + by * DRAWN_EPSILON}) for by in (0.2, 5))
            assert choosable(values, far, 0) == {chosen(values, far, 0)}
            assert choosable(values, near, 0) >= {chosen(values, far, 0), chosen(values, near, 0)}
    moved = [len(choosable(values, Sampling(max_tokens=1, seed=seed, top_p=0.8), 0)) for seed in range(20)]
    assert max(moved) == 2


@given(
    st.lists(st.floats(-8, 8), min_size=2, max_size=30),
    st.integers(0, 2**64 - 1),
    st.integers(0, 30),
    st.just(1.0) | st.floats(0.05, 1),
    st.floats(0, 1),
)
def test_what_is_chosen_is_choosable_and_is_left_by_the_filters(
    logits: list[float], seed: int, top_k: int, top_p: float, min_p: float
) -> None:
    values = np.array(logits)
    sampling = Sampling(max_tokens=9, seed=seed, top_k=top_k, top_p=top_p, min_p=min_p)
    for position in range(3):
        token = chosen(values, sampling, position)
        order, sums = filtered(values, sampling)
        assert token in order.tolist()
        assert sums[-1] == 1
        assert token in choosable(values, sampling, position)
        assert chosen(values, Sampling(max_tokens=9, temperature=0.0), position) == int(values.argmax())
