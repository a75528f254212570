import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.text.streaming import AnswerPart, AnswerText
from baton.text.tokenizer import Tokenizer


@given(
    text=st.text("the é😀.\n", max_size=40),
    stops=st.lists(st.text("the é😀.\n", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=200, max_size=200),
)
@settings(deadline=None, max_examples=200)
def test_an_answer_ends_before_its_first_stop_string(
    tokenizer: Tokenizer, text: str, stops: list[str], sizes: list[int]
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    answer = AnswerText(tokenizer, stops)
    sent, used, rest = "", 0, ids
    for size in sizes:
        part = answer.push(rest[:size])
        sent, used, rest = sent + part.text, used + part.num_tokens, rest[size:]
    sent += answer.flush().text
    ends = [(whole.find(stop) + len(stop), stop) for stop in stops if stop in whole]
    if ends:
        end = min(ends)[0]
        assert whole[:end].startswith(sent)
        assert sent + str(answer.ended_by) == whole[:end]
        assert len(tokenizer.decode(ids[:used])) >= end
    else:
        assert (sent, used, answer.ended_by) == (whole, len(ids), None)


def test_tokens_after_a_stop_string_do_not_count(byte_level_tokenizer: Tokenizer) -> None:
    ids = [byte_level_tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab.xy"]
    answer = AnswerText(byte_level_tokenizer, ["."])
    assert answer.push(ids) == AnswerPart("ab", 3, ".")
    assert answer.push(ids) == AnswerPart("", 0, ".")
    assert answer.flush() == AnswerPart("", 0, ".")


def test_a_stop_token_ends_the_answer_and_is_no_text(byte_level_tokenizer: Tokenizer) -> None:
    a, b = (byte_level_tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    answer = AnswerText(byte_level_tokenizer, stop_token_ids=[b])
    assert answer.push([a, b, a]) == AnswerPart("a", 2, b)
    assert answer.ended_by == b


def test_text_held_for_a_stop_string_comes_with_the_end(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("a..", add_special_tokens=False)
    answer = AnswerText(byte_level_tokenizer, ["...."])
    assert answer.push(ids).text == "a"
    part = answer.flush()
    assert (part.text, part.stopped) == ("..", False)


def test_text_held_comes_before_a_stop_token(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("a.", add_special_tokens=False)
    end = byte_level_tokenizer.eos_token_id
    assert end is not None
    answer = AnswerText(byte_level_tokenizer, ["..."], stop_token_ids=[end])
    assert answer.push([*ids, end]) == AnswerPart("a.", len(ids) + 1, end)


@pytest.mark.parametrize("skip_special", [True, False])
def test_a_broken_character_at_the_end_can_complete_a_stop_string(
    byte_level_tokenizer: Tokenizer, skip_special: bool
) -> None:
    ids = byte_level_tokenizer.encode("a🦜", add_special_tokens=False)[:-1]
    answer = AnswerText(byte_level_tokenizer, ["a\ufffd"], skip_special=skip_special)
    assert answer.push(ids).text == ""
    assert answer.flush() == AnswerPart("", 0, "a\ufffd")
