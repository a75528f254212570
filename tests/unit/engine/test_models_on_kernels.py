"""A model's layers on the CUDA kernels, compiled for the CPU, give the answers of the torch paths."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.engine import Engine
from baton.engine.models.weights import Weights
from baton.engine.sequence import Sequence

from ...batch_runs import greedy, run
from ...emulation import library as emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=f"emulation: {emulation.missing()}")

PROMPTS = [(5, 7, 11), tuple(range(20, 57)), (3,) * 16]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"attention_bias": True}),
    ("Mistral", {"sliding_window": 24}),
    ("Qwen3", {}),
    ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
]


class Watched:
    """A library that remembers which of its functions were asked for."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)
        return getattr(self._library, name)


def answers(path: Path) -> list[Sequence]:
    engine = Engine.build(path, torch.float32, torch.device("cpu"), kv_bytes=4 << 20, max_model_len=128)
    sequences = [greedy(index, prompt, 4) for index, prompt in enumerate(PROMPTS)]
    run(engine, sequences)
    return sequences


@pytest.mark.parametrize(("family", "changes"), KINDS, ids=str)
def test_greedy_answers_are_those_of_the_torch_paths(
    family: str, changes: dict[str, Any], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(family, head_dim=64, **changes)  # a size that the attention kernel takes too
    expected = [seq.tokens for seq in answers(path)]
    # Copied, as to a GPU, a weight begins at a multiple of 16 bytes; in its file it need not.
    from_file = Weights._from_file
    monkeypatch.setattr(Weights, "_from_file", lambda *arguments: from_file(*arguments).clone())
    library = Watched(emulation.compile_for_cpu())
    emulation.use(library, monkeypatch)  # type: ignore[arg-type]
    assert [seq.tokens for seq in answers(path)] == expected
    layer = {"add_rms_norm", "rotary_write", "silu_gate", "paged_decode_attention"}
    assert library.asked == {*layer, "choose_tokens"}
