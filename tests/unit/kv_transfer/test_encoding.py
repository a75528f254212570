"""Messages as bytes: what was said is what is heard, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.ids import BlockId, Epoch, SequenceId, TicketId, WorkerId
from baton.core.tickets import Geometry, Piece
from baton.kv_transfer.encoding import MOST_BYTES, Damaged, Wire, decode, encode, length
from baton.kv_transfer.messages import Hello, Returned

from ...pieces import a_piece

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=40)
GEOMETRIES = st.builds(
    Geometry,
    num_layers=U32,
    num_kv_heads=U32,
    head_size=U32,
    block_tokens=U32,
    dtype=TEXT,
    fingerprint=TEXT,
    first_layer=U32,
    model=TEXT,
)
PIECES = st.builds(
    Piece,
    ticket_id=TEXT.map(TicketId),
    sequence_id=TEXT.map(SequenceId),
    reader_epoch=U64.map(Epoch),
    source=TEXT.map(WorkerId),
    source_epoch=U64.map(Epoch),
    source_inbox=TEXT,
    blocks=st.lists(U32, max_size=5).map(tuple),
    checksums=st.lists(U64, max_size=5).map(tuple),
    geometry=GEOMETRIES,
    last=st.booleans(),
    first_token=st.none() | U32,
    source_blocks=st.lists(U32.map(BlockId), max_size=5).map(tuple),
    generations=st.lists(U64, max_size=5).map(tuple),
)
RETURNS = st.builds(
    Returned,
    ticket_id=TEXT.map(TicketId),
    sequence_id=TEXT.map(SequenceId),
    source_epoch=U64.map(Epoch),
    error_code=TEXT,
    error_message=TEXT,
)
MESSAGES: st.SearchStrategy[Wire] = st.one_of(PIECES, RETURNS, st.binary(min_size=16, max_size=16).map(Hello))


@given(MESSAGES)
def test_what_is_said_is_heard(message: Wire) -> None:
    assert decode(encode(message)) == message


@given(MESSAGES, st.data())
def test_any_flipped_bits_are_refused(message: Wire, data: st.DataObject) -> None:
    said = bytearray(encode(message))
    for at in data.draw(st.sets(st.integers(0, 8 * len(said) - 1), min_size=1, max_size=4)):
        said[at // 8] ^= 1 << at % 8
    with pytest.raises(Damaged):
        decode(bytes(said))


def test_each_single_flipped_bit_of_a_message_is_refused() -> None:
    said = encode(Returned(ticket_id=TicketId("t"), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1)))
    for at in range(8 * len(said)):
        damaged = bytearray(said)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(Damaged):
            decode(bytes(damaged))


@given(MESSAGES, st.data())
def test_a_message_that_is_cut_or_goes_on_is_refused(message: Wire, data: st.DataObject) -> None:
    said = encode(message)
    end = data.draw(st.integers(0, len(said) - 1))
    for damaged in (said[:end], said + b"\0", said + said):
        with pytest.raises(Damaged):
            decode(damaged)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Damaged):
        decode(data)


@given(MESSAGES)
def test_its_length_is_known_from_its_header(message: Wire) -> None:
    said = encode(message)
    assert length(said[:11]) is None
    assert length(said[:12]) == length(said + said) == len(said)


def test_a_message_beyond_the_bound_is_not_made_and_not_awaited() -> None:
    with pytest.raises(Damaged):
        encode(_long(MOST_BYTES // 4))
    assert len(encode(_long(1000))) < 5000
    with pytest.raises(Damaged):
        encode(_long(1, first=2**32))


def test_a_long_error_message_is_cut_between_characters() -> None:
    said = Returned(
        ticket_id=TicketId("t"), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1), error_message="ü" * 5000
    )
    heard = decode(encode(said))
    assert isinstance(heard, Returned)
    assert heard.error_message == "ü" * 2048


def _long(count: int, first: int = 0) -> Piece:
    geometry = Geometry(num_layers=1, num_kv_heads=1, head_size=1, block_tokens=1, dtype="float32", fingerprint="")
    return a_piece(geometry, (first, *range(1, count)))
