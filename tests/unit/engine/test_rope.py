"""The rotary embedding's frequencies beside those of transformers, and how far its tables may go."""

from typing import Any

import pytest
import torch

from baton.engine.models.config import RopeConfig
from baton.engine.models.rope import inverse_frequencies, rope_tables

CPU = torch.device("cpu")
SHORT = tuple(1.0 + pair / 16 for pair in range(64))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {
            "kind": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        {
            "kind": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 512,
            "attention_factor": 1.3,
            "truncate": False,
        },
        {"kind": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, "theta": 500000.0},
        {"kind": "linear", "factor": 3.0},
        {"kind": "dynamic", "factor": 2.3, "original_max_position_embeddings": 131072},
        {"kind": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096, "short_factor": SHORT},
        {
            "kind": "longrope",
            "factor": 1.0,
            "original_max_position_embeddings": 4096,
            "short_factor": SHORT,
            "attention_factor": 1.2,
        },
    ],
    ids=str,
)
def test_stretched_frequencies_are_those_of_transformers(fields: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = RopeConfig(**fields)
    given = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope.kind == "llama3" else {}
    given |= {"long_factor": [9.0] * 64} if rope.kind == "longrope" else {}
    given |= {name: value for name, value in fields.items() if name not in {"kind", "theta"}}
    parameters = given | {"rope_type": rope.kind, "rope_theta": rope.theta}
    config = LlamaConfig(head_dim=128, rope_parameters=parameters, max_position_embeddings=131072)
    expected, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, CPU)
    found, found_factor = inverse_frequencies(rope, 128)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found_factor == pytest.approx(factor)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_changes_with_the_length_is_refused_beyond_what_it_was_trained_for(kind: str) -> None:
    rope = RopeConfig(kind=kind, factor=4.0, original_max_position_embeddings=64, short_factor=(1.0,) * 8)
    assert rope_tables(rope, 16, 64, torch.float32)[0].shape == (64, 16)
    with pytest.raises(ValueError, match=r"up to 64 positions, not 65.*max_model_len"):
        rope_tables(rope, 16, 65, torch.float32)
