"""Steps to send around."""

from typing import Any

import numpy as np

from baton.engine.step_input import StepInput


def a_step(number: int, rows: int = 4, chunk_tokens: int = 0, changes: int = 1) -> StepInput:
    """Decodes `rows` rows at position `number`, beside a chunk of some tokens."""
    fields: dict[str, Any] = {
        name: np.empty(0, np.int32 if name == "table_blocks" else np.int64) for name in StepInput.__dataclass_fields__
    }
    fields |= {
        "table_at": np.arange(changes),
        "table_blocks": np.arange(changes, dtype=np.int32),
        "decode_rows": np.arange(rows),
        "positions": np.full(rows + chunk_tokens, number),
        "slots": np.arange(rows + chunk_tokens),
        "chunk_ids": np.arange(chunk_tokens) + number,
        "wanted": np.arange(rows),
        "sampled_rows": np.arange(rows),
    }
    return StepInput(**fields)


def number_of(step: StepInput) -> int:
    return int(step.positions[0])
