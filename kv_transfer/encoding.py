"""Messages as bytes, the same on a stream and in a Ray call. Nothing in them is unpickled.

    0      4         5      6       8         12                12 + n
    | n u32 | version | kind | 0 u16 | CRC-32 | body, n bytes ... | CRC-32 |    little-endian

The first checksum is of the eight bytes before it, so that a length is believed only where it is whole; the second of
all that stands before it. CRC-32 finds every single flipped bit, every burst of up to 32, and all but one in 2^32 of
whatever else. Sizes are bounded, strings are UTF-8 behind a u16 length, lists stand behind a u32 count.
"""

import struct
from zlib import crc32

from ..core.ids import BlockId, Epoch, SequenceId, TicketId, WorkerId
from ..core.tickets import Geometry, Piece
from .messages import Hello, Returned

VERSION = 1
MOST_BYTES = 4 << 20  # of a whole message: some 170,000 blocks
OVERHEAD = 16

_HEAD = struct.Struct("<IBBH")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _HEAD.size + _CHECK.size
_MOST_TEXT = 4096  # bytes; longer error messages are cut
_TOKEN_BYTES = 16

Wire = Piece | Returned | Hello


class Damaged(Exception):
    """These bytes are no message of ours, or not as they were sent."""


def encode(message: Wire) -> bytes:
    """Raises Damaged where it would be longer than any reader takes."""
    body = _Writer()
    match message:
        case Hello():
            kind = 1
            body.raw(message.token, _TOKEN_BYTES)
        case Returned():
            kind = 2
            for text in (message.ticket_id, message.sequence_id, message.error_code, message.error_message):
                body.text(text)
            body.number("Q", message.source_epoch)
        case Piece():
            kind = 3
            _encode_piece(body, message)
    data = body.data
    head = _HEAD.pack(len(data), VERSION, kind, 0)
    whole = b"".join((head, _CHECK.pack(crc32(head)), data))
    if len(whole) + _CHECK.size > MOST_BYTES:
        raise Damaged(f"a message of {len(whole)} bytes is too long")
    return whole + _CHECK.pack(crc32(whole))


def length(start: bytes | bytearray | memoryview) -> int | None:
    """Of the whole message that begins so; None: more of it is needed to say. Raises Damaged."""
    if len(start) < HEADER_BYTES:
        return None
    count, version, _, zero = _HEAD.unpack_from(start)
    if crc32(start[: _HEAD.size]) != _CHECK.unpack_from(start, _HEAD.size)[0]:
        raise Damaged("the header of a message is damaged")
    if version != VERSION or zero or count + OVERHEAD > MOST_BYTES:
        raise Damaged(f"a message of version {version} and {count} bytes is none of ours")
    return int(count) + OVERHEAD


def decode(data: bytes) -> Wire:
    """One whole message. Raises Damaged for anything else."""
    if length(data) != len(data):
        raise Damaged("a message is not as long as it says")
    if crc32(data[: -_CHECK.size]) != _CHECK.unpack_from(data, len(data) - _CHECK.size)[0]:
        raise Damaged("a message is damaged")
    body = _Reader(data[HEADER_BYTES : -_CHECK.size])
    try:
        message = _decode(data[5], body)
    except (struct.error, UnicodeDecodeError) as error:
        raise Damaged(f"a message can't be read: {error}") from None
    if not body.at_end:
        raise Damaged("a message has more than it should")
    return message


def _decode(kind: int, body: "_Reader") -> Wire:
    match kind:
        case 1:
            return Hello(body.raw(_TOKEN_BYTES))
        case 2:
            ticket, sequence, code, text = (body.text() for _ in range(4))
            return Returned(
                ticket_id=TicketId(ticket),
                sequence_id=SequenceId(sequence),
                error_code=code,
                error_message=text,
                source_epoch=Epoch(body.number("Q")),
            )
        case 3:
            return _decode_piece(body)
        case _:
            raise Damaged(f"no message has the kind {kind}")


def _encode_piece(body: "_Writer", piece: Piece) -> None:
    geometry = piece.geometry
    for text in (piece.ticket_id, piece.sequence_id, piece.source, piece.source_inbox):
        body.text(text)
    for text in (geometry.dtype, geometry.fingerprint, geometry.model):
        body.text(text)
    for count in (
        geometry.num_layers,
        geometry.num_kv_heads,
        geometry.head_size,
        geometry.block_tokens,
        geometry.first_layer,
    ):
        body.number("I", count)
    body.number("Q", piece.reader_epoch)
    body.number("Q", piece.source_epoch)
    body.number("B", piece.last)
    body.number("q", -1 if piece.first_token is None else piece.first_token)
    body.numbers("I", piece.blocks)
    body.numbers("Q", piece.checksums)
    body.numbers("I", piece.source_blocks)
    body.numbers("Q", piece.generations)


def _decode_piece(body: "_Reader") -> Piece:
    ticket, sequence, source, inbox, dtype, fingerprint, model = (body.text() for _ in range(7))
    layers, heads, size, tokens, first_layer = (body.number("I") for _ in range(5))
    reader_epoch, source_epoch, last, first = (body.number(kind) for kind in "QQBq")
    return Piece(
        ticket_id=TicketId(ticket),
        sequence_id=SequenceId(sequence),
        reader_epoch=Epoch(reader_epoch),
        source=WorkerId(source),
        source_epoch=Epoch(source_epoch),
        source_inbox=inbox,
        geometry=Geometry(
            num_layers=layers,
            num_kv_heads=heads,
            head_size=size,
            block_tokens=tokens,
            dtype=dtype,
            fingerprint=fingerprint,
            first_layer=first_layer,
            model=model,
        ),
        last=bool(last),
        first_token=None if first < 0 else first,
        blocks=body.numbers("I"),
        checksums=body.numbers("Q"),
        source_blocks=tuple(BlockId(block) for block in body.numbers("I")),
        generations=body.numbers("Q"),
    )


class _Writer:
    def __init__(self) -> None:
        self._parts: list[bytes] = []

    @property
    def data(self) -> bytes:
        return b"".join(self._parts)

    def raw(self, data: bytes, size: int) -> None:
        if len(data) != size:
            raise Damaged(f"{len(data)} bytes where {size} belong")
        self._parts.append(data)

    def number(self, kind: str, value: int) -> None:
        self._parts.append(_packed(kind, (value,)))

    def numbers(self, kind: str, values: "tuple[int, ...]") -> None:
        self._parts += (_packed("I", (len(values),)), _packed(kind, values))

    def text(self, text: str) -> None:
        data = text.encode()[:_MOST_TEXT].decode(errors="ignore").encode()
        self._parts += (_packed("H", (len(data),)), data)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._data)

    def raw(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise Damaged("a message ends too early")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, kind: str) -> int:
        return self._unpack(kind, 1)[0]

    def numbers(self, kind: str) -> tuple[int, ...]:
        return self._unpack(kind, self.number("I"))

    def text(self) -> str:
        return self.raw(self.number("H")).decode()

    def _unpack(self, kind: str, count: int) -> tuple[int, ...]:
        size = count * struct.calcsize(f"<{kind}")
        return struct.unpack(f"<{count}{kind}", self.raw(size))


def _packed(kind: str, values: "tuple[int, ...]") -> bytes:
    try:
        return struct.pack(f"<{len(values)}{kind}", *values)
    except struct.error as error:
        raise Damaged(f"a number does not fit its field: {error}") from None
