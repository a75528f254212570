"""What crosses the ring between a worker's service and its rank: one kind byte, a u32 number, a body.

The number is a link's for link traffic, and a question's for questions and their answers. Bodies are wire/'s encodings
of frames, ledgers, statuses and reports, and JSON of the small dataclasses here. Nothing is pickled.
"""

import json
import struct
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from ..core.tickets import Geometry

_HEADER = struct.Struct("<BI")


class Kind(IntEnum):
    FRAME = 1  # both ways: link traffic; the first one opens the link
    LINK_CLOSED = 2  # to the rank: end every sequence of the link
    STOP = 3  # to the rank: leave the loop
    LEDGER = 4  # question (body: b"drop" to drop cached blocks first) and answer, as the four below
    STATUS = 5
    DRAIN = 6  # take no more; answered when nothing is left
    REMAINING = 7  # how many sequences still hold something: a u32
    PROGRESS = 8  # from the rank, before it is ready
    READY = 9  # from the rank, once
    REPORT = 10  # from the rank


@dataclass(frozen=True, slots=True)
class Record:
    kind: Kind
    number: int = 0
    body: bytes = b""

    def parts(self) -> tuple[bytes, bytes]:
        return _HEADER.pack(self.kind, self.number), self.body

    @classmethod
    def parse(cls, data: bytes) -> "Record":
        kind, number = _HEADER.unpack_from(data)
        return cls(Kind(kind), number, data[_HEADER.size :])


@dataclass(frozen=True, slots=True)
class Progress:
    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What start-up measured; the service registers with it."""

    num_blocks: int
    geometry: Geometry
    vocab_size: int
    max_model_len: int


def encode(body: Progress | Ready) -> bytes:
    return json.dumps(asdict(body)).encode()


def decode_progress(body: bytes) -> Progress:
    return Progress(**_fields(body))


def decode_ready(body: bytes) -> Ready:
    fields = _fields(body)
    return Ready(**{**fields, "geometry": Geometry(**fields["geometry"])})


def _fields(body: bytes) -> dict[str, Any]:
    fields = json.loads(body)
    assert isinstance(fields, dict), body[:100]
    return fields
