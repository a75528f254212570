"""Predicted lengths follow the answers that have ended."""

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.length_predictor import FIRST_GUESS, MOST_TENANTS, LengthPredictor

FAR = 100_000  # a max_tokens that bounds nothing here


def test_before_any_answer_has_ended_a_guess_stands() -> None:
    assert LengthPredictor().remaining("a", 0, FAR) == FIRST_GUESS


def test_a_tenant_s_own_answers_are_what_counts_for_it() -> None:
    predictor = LengthPredictor()
    for _ in range(200):
        predictor.ended("short", 10)
        predictor.ended("long", 1_000)
    assert predictor.remaining("short", 0, FAR) == 10
    assert predictor.remaining("long", 0, FAR) == 1_000


def test_a_new_tenant_s_answers_are_expected_to_be_as_all_others_are() -> None:
    predictor = LengthPredictor()
    for _ in range(20):
        predictor.ended("a", 40)
    assert predictor.remaining("new", 0, FAR) == 40
    predictor.ended("new", 60)
    assert predictor.remaining("new", 0, FAR) == 50  # of all others, and its own first


def test_the_mean_follows_a_tenant_whose_answers_change() -> None:
    predictor = LengthPredictor()
    for tokens in [10] * 1_000 + [500] * 100:
        predictor.ended("a", tokens)
    assert 490 < predictor.remaining("a", 0, FAR) <= 500


def test_less_is_expected_as_an_answer_grows_and_never_nothing() -> None:
    predictor = LengthPredictor()
    predictor.ended("a", 100)
    assert [predictor.remaining("a", tokens, FAR) for tokens in (0, 30, 50, 99, 5_000)] == [100, 70, 50, 50, 50]


def test_no_more_is_expected_than_an_answer_may_have() -> None:
    predictor = LengthPredictor()
    predictor.ended("a", 100)
    assert [predictor.remaining("a", tokens, 64) for tokens in (0, 20, 60, 64, 65)] == [64, 44, 4, 0, 0]


@given(st.lists(st.integers(0, 10_000)), st.integers(0, 10_000), st.integers(1, 10_000))
def test_a_prediction_lies_between_one_and_what_is_left(ended: list[int], tokens: int, max_tokens: int) -> None:
    predictor = LengthPredictor()
    for length in ended:
        predictor.ended("a", length)
    left = max(0, max_tokens - tokens)
    assert min(1, left) <= predictor.remaining("a", tokens, max_tokens) <= left


def test_the_tenant_whose_answers_ended_longest_ago_is_forgotten_first() -> None:
    predictor = LengthPredictor()
    predictor.ended("kept", 7)
    predictor.ended("forgotten", 7)
    for index in range(MOST_TENANTS - 1):
        predictor.ended("kept", 7)
        predictor.ended(f"tenant {index}", 1_000)
    assert predictor.remaining("kept", 0, FAR) == 7
    assert predictor.remaining("forgotten", 0, FAR) == predictor.remaining("nobody", 0, FAR) > 500
