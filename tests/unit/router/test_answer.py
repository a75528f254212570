"""Ordering: whatever comes in whatever order, each token is given on once."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import WorkerLost
from baton.core.ids import SequenceId
from baton.core.request import FinishReason, PromptLogprob, Sampling, SequenceTokens, TokenLogprobs
from baton.router.answer import Answer
from baton.router.records import Delta
from baton.text.streaming import AnswerText
from baton.text.tokenizer import Tokenizer


def said(first: int, ids: list[int], cached: int = 0) -> SequenceTokens:
    return SequenceTokens(
        sequence_id=SequenceId("r/0"), first_position=first, token_ids=tuple(ids), cached_tokens=cached
    )


def an_answer(tokenizer: Tokenizer, stops: tuple[str, ...] = (), **sampling: Any) -> tuple[Answer, list[Delta]]:
    given_on: list[Delta] = []
    settled = Sampling(**{"max_tokens": 50, "stop_token_ids": frozenset({0}), **sampling})
    text = AnswerText(tokenizer, stops, settled.stop_token_ids)
    return Answer(settled, text, given_on.append), given_on


@given(data=st.data(), ids=st.lists(st.integers(1, 256), min_size=1, max_size=30))
@settings(max_examples=150, deadline=None)
def test_every_token_is_given_on_once_and_in_order(data: st.DataObject, ids: list[int], tokenizer: Tokenizer) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(ids) - 1)))))
    bounds = [0, *[cut for cut in cuts if cut < len(ids)], len(ids)]
    chunks = [(a, ids[a:b]) for a, b in pairwise(bounds)]
    again = data.draw(st.lists(st.sampled_from(chunks), max_size=4))
    early = data.draw(st.permutations(chunks[:-1] + again))
    answer, given_on = an_answer(tokenizer)
    last = chunks[-1]
    missing = data.draw(st.booleans()) and len(early) > 0
    for first, chunk in early[:-1] if missing else early:
        answer.take([said(first, chunk)], None)
    answer.take([said(*last)], FinishReason.LENGTH)
    if missing:  # the link that is behind brings what is missing after the end was told
        answer.take([said(*early[-1])], None)
    assert [token for delta in given_on for token in delta.token_ids] == ids
    assert "".join(delta.text for delta in given_on) == tokenizer.decode(ids)
    assert [delta.finish for delta in given_on if delta.finish] == [FinishReason.LENGTH]
    assert given_on[-1].finish


def test_a_gap_holds_back_what_follows(tokenizer: Tokenizer) -> None:
    answer, given_on = an_answer(tokenizer)
    answer.take([said(1, [5, 6])], None)
    assert not given_on
    answer.take([said(0, [4], cached=16)], None)
    assert [delta.token_ids for delta in given_on] == [(4, 5, 6)]
    assert answer.cached_tokens == 16


def test_tokens_of_columns_are_given_on_with_those_that_came_by_name(tokenizer: Tokenizer) -> None:
    answer, given_on = an_answer(tokenizer)
    answer.take([], None, [(2, 6), (1, 5)])
    assert not given_on
    answer.take([said(0, [4], cached=16)], None, [(3, 7)])
    answer.take([], FinishReason.LENGTH, [(3, 7), (4, 8)])
    assert [delta.token_ids for delta in given_on] == [(4, 5, 6, 7), (8,)]
    assert given_on[-1].finish is FinishReason.LENGTH


def test_a_second_try_that_contradicts_in_a_column_is_an_error(tokenizer: Tokenizer) -> None:
    answer, _ = an_answer(tokenizer)
    answer.take([said(0, [4, 5])], None)
    answer.restart()
    with pytest.raises(WorkerLost, match="exactly"):
        answer.take([], None, [(1, 7)])


OF_PROMPT = (None, TokenLogprobs(-0.5, ((8, -0.1), (7, -0.5))))
GIVEN_OF_PROMPT = (
    PromptLogprob(token_id=6, logprob=None),
    PromptLogprob(token_id=7, logprob=-0.5, top=((8, -0.1), (7, -0.5))),
)


def test_log_probabilities_of_the_prompt_come_with_the_first_token_and_only_once(tokenizer: Tokenizer) -> None:
    given_on: list[Delta] = []
    answer = Answer(Sampling(max_tokens=9, prompt_logprobs=2), AnswerText(tokenizer), given_on.append, prompt=(6, 7))
    first = replace(said(0, [4]), prompt_logprobs=OF_PROMPT)
    answer.take([], None, [(1, 5)])
    answer.take([first], None)
    answer.restart()
    answer.take([first], None, [(1, 5), (2, 6)])
    assert [delta.token_ids for delta in given_on] == [(4, 5), (6,)]
    assert [delta.prompt_logprobs for delta in given_on] == [GIVEN_OF_PROMPT, ()]


def test_log_probabilities_of_another_prompt_are_not_believed(tokenizer: Tokenizer) -> None:
    answer = Answer(Sampling(max_tokens=9, prompt_logprobs=2), AnswerText(tokenizer), lambda _: None, prompt=(6,))
    with pytest.raises(WorkerLost, match="prompt"):
        answer.take([replace(said(0, [4]), prompt_logprobs=OF_PROMPT)], None)


def test_an_end_before_the_first_token_is_an_error(tokenizer: Tokenizer) -> None:
    answer, _ = an_answer(tokenizer)
    with pytest.raises(WorkerLost):
        answer.take([], FinishReason.STOP)


def test_a_second_try_repeats_nothing_and_goes_on(tokenizer: Tokenizer) -> None:
    answer, given_on = an_answer(tokenizer)
    answer.take([said(0, [4, 5])], None)
    answer.restart()
    answer.take([said(0, [4, 5, 6])], FinishReason.LENGTH)
    assert [delta.token_ids for delta in given_on] == [(4, 5), (6,)]


def test_a_second_try_that_contradicts_the_first_is_an_error(tokenizer: Tokenizer) -> None:
    answer, given_on = an_answer(tokenizer)
    answer.take([said(0, [4, 5])], None)
    answer.restart()
    with pytest.raises(WorkerLost, match="exactly"):
        answer.take([said(0, [4, 7])], None)
    assert [delta.token_ids for delta in given_on] == [(4, 5)]


def test_nothing_is_given_on_past_a_stop_string(tokenizer: Tokenizer) -> None:
    answer, given_on = an_answer(tokenizer, stops=("lo",))
    answer.take([said(0, tokenizer.encode("hello there"))], None)
    assert "".join(delta.text for delta in given_on) == "hel"
    assert [token for delta in given_on for token in delta.token_ids] == tokenizer.encode("hello")
    assert answer.finished is FinishReason.STOP
    answer.take([said(11, [9])], FinishReason.LENGTH)
    assert len(given_on) == 1


def test_a_stop_token_is_counted_and_has_no_text(tokenizer: Tokenizer) -> None:
    answer, given_on = an_answer(tokenizer)
    answer.take([said(0, [*tokenizer.encode("a"), 0, 9])], FinishReason.STOP)
    assert [(delta.text, len(delta.token_ids), delta.finish) for delta in given_on] == [("a", 2, FinishReason.STOP)]


def test_positions_beyond_max_tokens_are_dropped(tokenizer: Tokenizer) -> None:
    answer, given_on = an_answer(tokenizer, max_tokens=2)
    answer.take([said(5, [9] * 1000)], None)
    answer.take([said(0, [4, 5, 6])], None)
    assert [delta.token_ids for delta in given_on] == [(4, 5)]
    assert answer.finished is FinishReason.LENGTH


def test_finishing_twice_changes_nothing(tokenizer: Tokenizer) -> None:
    answer, given_on = an_answer(tokenizer)
    answer.finish(FinishReason.CANCELLED)
    answer.finish(FinishReason.CANCELLED)
    answer.take([said(0, [4])], FinishReason.STOP)
    assert [delta.finish for delta in given_on] == [FinishReason.CANCELLED]
