"""Block keys: a chained hash that names what a full block holds, the same in every process and language.

    key_i = BLAKE2b-128(key_{i-1} || token ids of unit i, little-endian u32)
    key_{-1} = BLAKE2b-128(fingerprint, salt)

The unit is always 16 tokens, whatever the block size: a block takes the key of its last unit. Sources: the chained
block hash of PagedAttention's prefix cache (Kwon et al., SOSP 2023, section 4), with a cryptographic hash, since a
collision would answer one user with another's text.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b

from .ids import BlockKey

UNIT_TOKENS = 16
KEY_BYTES = 16
_pack_unit = struct.Struct(f"<{UNIT_TOKENS}I").pack


def root_key(fingerprint: str, salt: str = "") -> BlockKey:
    """Key before the first unit. The two texts are length-prefixed, so that no pair runs into another."""
    parts = [text.encode() for text in (fingerprint, salt)]
    return _digest(b"".join(struct.pack("<I", len(part)) + part for part in parts))


def block_keys(tokens: Sequence[int], block_tokens: int, root: BlockKey) -> list[BlockKey]:
    """One key per full block of `tokens`, in order. Raises ValueError unless block_tokens is a multiple of 16."""
    if block_tokens < UNIT_TOKENS or block_tokens % UNIT_TOKENS:
        raise ValueError(f"block_tokens must be a multiple of {UNIT_TOKENS}, not {block_tokens}")
    keys: list[BlockKey] = []
    key = root
    for end in range(UNIT_TOKENS, len(tokens) + 1, UNIT_TOKENS):
        key = _digest(key + _pack_unit(*tokens[end - UNIT_TOKENS : end]))
        if end % block_tokens == 0:
            keys.append(key)
    return keys


def _digest(data: bytes) -> BlockKey:
    return BlockKey(blake2b(data, digest_size=KEY_BYTES).digest())
