import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.text.detokenizer import REPLACEMENT, IncrementalDetokenizer
from baton.text.tokenizer import Tokenizer

IDS = st.lists(st.integers(0, 430), max_size=60)  # some are outside the vocabulary
TEXTS = st.one_of(st.text(max_size=40), st.text("aé the😀東 👩‍👧\n", max_size=40))
MANY = settings(deadline=None, max_examples=300)


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special)
    return [*(detokenizer.push([token]) for token in ids), detokenizer.flush()]


def mended(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> list[int]:
    """The tokens, each byte token that belongs to no character replaced by the token of the replacement character."""
    (replacement,) = (
        token
        for token in range(tokenizer.vocab_size)
        if tokenizer.decode([token], skip_special=False) == REPLACEMENT and token not in tokenizer.byte_tokens
    )
    kept = [
        token
        for token in ids
        if tokenizer.is_known(token) and not (skip_special and token in tokenizer.special_token_ids)
    ]
    result: list[int] = []
    run: list[int] = []
    for token in [*kept, -1]:
        if token in tokenizer.byte_tokens:
            run.append(token)
            continue
        text = bytes(tokenizer.byte_tokens[item] for item in run).decode(errors="surrogateescape")
        at = 0
        for character in text:
            width = len(character.encode(errors="surrogateescape"))
            result += [replacement] if "\udc80" <= character <= "\udcff" else run[at : at + width]
            at += width
        run = []
        result += [token] if token >= 0 else []
    return result


@given(ids=IDS, skip_special=st.booleans())
@MANY
def test_parts_of_any_byte_level_tokens_join_to_the_decoding_of_all(
    byte_level_tokenizer: Tokenizer, ids: list[int], skip_special: bool
) -> None:
    expected = byte_level_tokenizer.decode(ids, skip_special=skip_special)
    assert "".join(stream(byte_level_tokenizer, ids, skip_special)) == expected


@given(ids=IDS, skip_special=st.booleans())
@MANY
def test_parts_of_any_byte_fallback_tokens_join_to_the_decoding_with_broken_bytes_replaced(
    byte_fallback_tokenizer: Tokenizer, ids: list[int], skip_special: bool
) -> None:
    tokenizer = byte_fallback_tokenizer
    expected = tokenizer.decode(mended(tokenizer, ids, skip_special), skip_special=skip_special)
    assert "".join(stream(tokenizer, ids, skip_special)) == expected


@given(text=TEXTS)
@MANY
def test_parts_of_a_text_join_to_its_decoding_and_never_hold_a_broken_character(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    parts = stream(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in part for part in parts)


@given(text=TEXTS, sizes=st.lists(st.integers(1, 5), min_size=60, max_size=60))
@settings(deadline=None)
def test_how_tokens_are_grouped_changes_nothing(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    joined = ""
    rest = ids
    for size in [*sizes, len(ids)]:
        joined += detokenizer.push(rest[:size])
        rest = rest[size:]
    assert joined + detokenizer.flush() == tokenizer.decode(ids)


def test_a_character_comes_out_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦜", add_special_tokens=False)
    parts = stream(tokenizer, ids)
    assert parts[-2:] == ["🦜", ""]
    assert "".join(parts[:-2]) == "a"


def test_half_a_character_at_the_end_becomes_replacement_characters(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("a🦜", add_special_tokens=False)[:-1]
    assert stream(byte_level_tokenizer, ids)[-1] == REPLACEMENT
    assert "".join(stream(byte_level_tokenizer, ids)) == byte_level_tokenizer.decode(ids)


def test_valid_characters_of_a_broken_byte_run_stay(byte_fallback_tokenizer: Tokenizer) -> None:
    tokens = {byte: token for token, byte in byte_fallback_tokenizer.byte_tokens.items()}
    ids = [tokens[byte] for byte in "€".encode() + b"\xff" + "€".encode()]
    assert stream(byte_fallback_tokenizer, ids) == ["", "", "€", REPLACEMENT, "", "", "€", ""]


@pytest.mark.parametrize("count", [10, 3000])
def test_bytes_that_never_become_a_character_do_not_pile_up(byte_level_tokenizer: Tokenizer, count: int) -> None:
    bad = byte_level_tokenizer.encode("é", add_special_tokens=False)
    lonely = next(
        token for token in range(byte_level_tokenizer.vocab_size) if byte_level_tokenizer.decode([token]) == REPLACEMENT
    )
    detokenizer = IncrementalDetokenizer(byte_level_tokenizer)
    sent = "".join(detokenizer.push([lonely]) for _ in range(count))
    assert len(sent) >= count - 1
    assert len(detokenizer._window) < 20
    assert sent + detokenizer.push(bad) + detokenizer.flush() == REPLACEMENT * count + "é"


def test_special_tokens_are_text_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>in")
    assert "".join(stream(tokenizer, ids, skip_special=False)).startswith("<s>")
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
