"""A deterministic engine on a GPU: logits are the same to the last bit, whatever else is in a step, by graph or not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.engine.engine import Engine
from baton.kernels import prefill_tiles

from ..batch_runs import Way
from ..exact_runs import check

WAYS = [
    Way(step_tokens=4096, join_every=0, lookahead=True),
    Way(step_tokens=23, join_every=2),
    Way(step_tokens=64, lookahead=True, ballast=2),
    Way(step_tokens=17, join_every=0, lookahead=True, ballast=3, swap_blocks=40),
]


@pytest.mark.parametrize("piece_tiles", [1, prefill_tiles._PIECE_TILES])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("Llama", {}), ("Llama", {"head_dim": 128, "num_key_value_heads": 1}), ("Mistral", {"sliding_window": 150})],
    ids=str,
)
def test_logits_are_the_same_bits_in_every_way(
    family: str,
    changes: dict[str, int],
    piece_tiles: int,
    checkpoint: Callable[..., Path],
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("exact kernels are Hopper's")
    monkeypatch.setattr(prefill_tiles, "_PIECE_TILES", piece_tiles)
    path = checkpoint(family, vocab_size=208, **changes)
    engine = Engine.build(
        path, torch.bfloat16, gpu, kv_bytes=8 << 20, max_model_len=1024, max_batch=8, deterministic=True
    )
    for seed, way in enumerate(WAYS):
        check(engine, seed, 500, way, monkeypatch)


def test_what_has_no_exact_kernels_is_refused(checkpoint: Callable[..., Path], gpu: torch.device) -> None:
    with pytest.raises(ValueError, match="deterministic"):
        Engine.build(checkpoint("Llama"), torch.float32, gpu, kv_bytes=8 << 20, deterministic=True)
    with pytest.raises(ValueError, match="outputs of 8"):  # a vocabulary of 211
        Engine.build(checkpoint("Llama"), torch.bfloat16, gpu, kv_bytes=8 << 20, deterministic=True)
