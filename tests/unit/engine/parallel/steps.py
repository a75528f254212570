"""Steps to send around."""

from typing import Any

import numpy as np

from baton.engine.step_input import StepInput

_WIDE = ("table_at", "token_ids", "decode_positions", "chunk_starts", "chunk_counts", "chunk_ids", "wanted")


def a_step(number: int, rows: int = 4, chunk_tokens: int = 0, changes: int = 1) -> StepInput:
    """Decodes `rows` rows at position `number`, beside a chunk of some tokens."""
    fields: dict[str, Any] = {
        name: np.empty(0, np.int64 if name in _WIDE else np.int32) for name in StepInput.__dataclass_fields__
    }
    fields |= {
        "table_at": np.arange(changes),
        "table_blocks": np.arange(changes, dtype=np.int32),
        "decode_rows": np.arange(rows, dtype=np.int32),
        "decode_positions": np.full(rows, number),
        "chunk_ids": np.arange(chunk_tokens) + number,
        "wanted": np.arange(rows),
        "sampled_rows": np.arange(rows, dtype=np.int32),
    }
    return StepInput(**fields)


def number_of(step: StepInput) -> int:
    return int(step.decode_positions[0])
