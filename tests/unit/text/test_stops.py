from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.text.stops import StopStrings

LETTERS = st.text("abc", max_size=24)


def first_match(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The naive search: grow the text by one character until a stop string ends it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def in_parts(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(LETTERS, st.lists(st.text("abc", min_size=1, max_size=5), max_size=4), st.lists(st.integers(0, 24), max_size=8))
def test_streamed_text_ends_where_a_search_of_the_whole_ends(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, stop = first_match(text, stops)
    search = StopStrings(stops)
    sent = ""
    for part in in_parts(text, cuts):
        new, matched = search.push(part)
        sent += new
        assert expected.startswith(sent)
        if matched is not None:
            break
    assert search.matched == stop
    assert sent + search.flush() == expected


@given(LETTERS, st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4))
def test_only_what_may_begin_a_stop_string_is_held(text: str, stops: list[str]) -> None:
    search = StopStrings(stops)
    sent, matched = search.push(text)
    if matched is None:
        held = text[len(sent) :]
        suffixes = [text[start:] for start in range(len(text))]
        proper = [suffix for suffix in suffixes if any(stop.startswith(suffix) for stop in stops)]
        assert held == max(proper, key=len, default="")


def test_the_match_that_is_complete_first_wins() -> None:
    assert StopStrings(["abcd", "bc"]).push("xabcd") == ("xa", "bc")


def test_of_matches_that_end_together_the_one_that_begins_first_wins() -> None:
    assert StopStrings(["c", "abc", "bc"]).push("xabc") == ("x", "abc")


def test_nothing_comes_out_after_a_match() -> None:
    search = StopStrings(["."])
    assert search.push("One. Two") == ("One", ".")
    assert search.push("Three") == ("", ".")
    assert search.flush() == ""


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStrings([]).push("text") == ("text", None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
