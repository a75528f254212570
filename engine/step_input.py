"""What the host says of one step: numbers alone, so that every rank of a worker can be told the same.

Device tables outlive a step and are fed by the difference. What the host can reckon it does: an operation on a small
tensor costs its thread more than one on an array. The tokens of a step: one per decode row first, then the prompts'
chunks, one after the other.
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_LENGTHS = struct.Struct("<15Q")  # elements of each field, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """R rows of the batch, W blocks a row. Carried out in the order of the fields."""

    copy_from: I64  # [c] blocks copied whole before anything is written (copy-on-write) ...
    copy_to: I64  # [c] ... to these
    table_at: I64  # [n] = row * W + column: entries of the block tables [R, W] that change; one twice: to the same
    table_blocks: I32  # [n]
    token_rows: I64  # [m] rows whose last token the host knows and the device does not ...
    token_ids: I64  # [m]
    decode_rows: I64  # [S] each lacks the KV of its last token, which is last_tokens[row]
    positions: I64  # [T] of the step's tokens, each in its sequence
    slots: I64  # [T] = block * P + offset: where their K and V go
    chunk_rows: I64  # [C]
    chunk_starts: I64  # [C] position of each chunk's first token
    chunk_counts: I64  # [C]
    chunk_ids: I64  # [sum of chunk_counts] token ids
    wanted: I64  # of the step's T tokens, those whose logits are wanted, rising
    sampled_rows: I64  # [S'] rows that get a token after the forward pass: all that decode first, in their order

    @classmethod
    def empty(cls) -> "StepInput":
        """A step of nothing."""
        return cls(**{name: np.empty(0, dtype) for name, dtype in _FIELDS})

    def to_bytes(self) -> bytes:
        """For the other ranks of this host: no port takes it."""
        arrays = [getattr(self, name) for name, _ in _FIELDS]
        return b"".join([_LENGTHS.pack(*map(len, arrays)), *(_padded(array.tobytes()) for array in arrays)])

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> "StepInput":
        """Views of `data`."""
        offset, arrays = _LENGTHS.size, []
        for (_, dtype), length in zip(_FIELDS, _LENGTHS.unpack_from(data), strict=True):
            arrays.append(np.frombuffer(data, dtype, length, offset))
            offset += -(-length * dtype.itemsize // 8) * 8
        return cls(**dict(zip(_NAMES, arrays, strict=True)))


_FIELDS = tuple(
    (name, np.dtype(np.int32 if name == "table_blocks" else np.int64)) for name in StepInput.__dataclass_fields__
)
_NAMES = tuple(name for name, _ in _FIELDS)


def _padded(data: bytes) -> bytes:
    """So that the next array begins where its numbers are aligned."""
    return data if len(data) % 8 == 0 else data + bytes(-len(data) % 8)
