"""What the host says of one step: numbers alone, so that every rank of a worker can be told the same.

Device tables outlive a step and are fed by the difference; what a decode row reads is there already but for its
position. The tokens of a step: one per decode row first, then the prompts' chunks, one after the other.
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_LENGTHS = struct.Struct("<14Q")  # elements of each field, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """R rows of the batch, W blocks a row. Carried out in the order of the fields."""

    copy_from: I32  # [c] blocks copied whole before anything is written (copy-on-write) ...
    copy_to: I32  # [c] ... to these
    table_at: I64  # [n] = row * W + column: entries of the block tables [R, W] that change
    table_blocks: I32  # [n]
    token_rows: I32  # [m] rows whose last token the host knows and the device does not ...
    token_ids: I64  # [m]
    decode_rows: I32  # [S] each lacks the KV of its last token, which is last_tokens[row]
    decode_positions: I64  # [S] of that token
    chunk_rows: I32  # [C]
    chunk_starts: I64  # [C] position of each chunk's first token
    chunk_counts: I64  # [C]
    chunk_ids: I64  # [sum of chunk_counts] token ids
    wanted: I64  # of the step's T tokens, those whose logits are wanted, rising
    sampled_rows: I32  # [S'] rows that get a token; what it is comes after the forward pass

    @property
    def num_tokens(self) -> int:
        return len(self.decode_rows) + len(self.chunk_ids)

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


_NARROW = frozenset({"copy_from", "copy_to", "table_blocks", "token_rows", "decode_rows", "chunk_rows", "sampled_rows"})
_FIELDS = tuple((name, np.dtype(np.int32 if name in _NARROW else np.int64)) for name in StepInput.__dataclass_fields__)
_NAMES = tuple(name for name, _ in _FIELDS)


def _padded(data: bytes) -> bytes:
    """So that the next array begins where its numbers are aligned."""
    return data if len(data) % 8 == 0 else data + bytes(-len(data) % 8)
