"""A model's layers on the CUDA kernels, compiled for the CPU, give the answers of the torch paths."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.engine import Engine
from baton.engine.models import layers
from baton.engine.models.weights import Weights
from baton.engine.sequence import Sequence
from baton.engine.step_input import StepInput

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


def first_logits(path: Path) -> torch.Tensor:
    """Of the step that reads all prompts."""
    engine = Engine.build(path, torch.bfloat16, torch.device("cpu"), kv_bytes=4 << 20, max_model_len=128)
    forward, logits = engine.executor.forward, []

    def recorded(step: StepInput) -> torch.Tensor:
        logits.append(forward(step))
        return logits[-1]

    engine.executor.forward = recorded  # type: ignore[method-assign]
    run(engine, [greedy(index, prompt, 2) for index, prompt in enumerate(PROMPTS)])
    return logits[0].double()


@pytest.mark.parametrize(("family", "changes"), [("Llama", {"attention_bias": True}), ("Mixtral", {})], ids=str)
def test_products_in_bfloat16_add_to_the_stream_and_meet_in_the_gate(
    family: str, changes: dict[str, Any], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(family, head_dim=64, intermediate_size=128, vocab_size=208, **changes)
    monkeypatch.setattr(layers, "pack_weight", lambda weight: weight)  # as on a GPU
    expected = first_logits(path)
    from_file = Weights._from_file
    monkeypatch.setattr(Weights, "_from_file", lambda *arguments: from_file(*arguments).clone())
    library = Watched(emulation.compile_for_cpu())
    emulation.use(library, monkeypatch)  # type: ignore[arg-type]
    found = first_logits(path)
    assert ((found - expected).norm() / expected.norm()).item() < 3e-2  # roundings of bfloat16, other ones
    assert "hopper_linear" in library.asked
    assert ("silu_gate" in library.asked) == (family == "Mixtral")  # its experts are torch's products
