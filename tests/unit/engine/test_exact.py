"""A deterministic engine: logits are the same to the last bit, whatever else is in a step and however prompts are cut.

On the CPU tokens pass through the model one by one. The kernels for a GPU run here on the CPU (see tests/emulation).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.engine.engine import Engine
from baton.engine.executor import Executor
from baton.engine.loading import load_part
from baton.engine.models.safetensors_file import SafetensorsDir
from baton.kernels import prefill_tiles

from ...batch_runs import Way
from ...emulation import library as emulation
from ...exact_runs import check
from .test_decode_graphs import Capture

CPU = torch.device("cpu")
KV_BYTES = 40 << 14

WAYS = st.builds(
    Way,
    step_tokens=st.sampled_from([16, 17, 23, 64, 4096]),
    join_every=st.integers(0, 3),
    lookahead=st.booleans(),
    swap_blocks=st.sampled_from([0, 0, 20]),
    ballast=st.integers(0, 5),
)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("Llama", torch.bfloat16), ("Mistral", torch.float32), ("Qwen3", torch.float32), ("Mixtral", torch.bfloat16)],
    ids=str,
)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 20), way=WAYS)
def test_on_the_cpu(
    seed: int,
    way: Way,
    family: str,
    dtype: torch.dtype,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"Mistral": {"sliding_window": 24}, "Mixtral": {"num_local_experts": 4}}.get(family, {})
    path = checkpoint(family, **changes)
    engine = Engine.build(path, dtype, CPU, KV_BYTES, max_model_len=256, max_batch=8, deterministic=True)
    check(engine, seed, 90, way, monkeypatch)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if emulation.missing() is not None:
        pytest.skip(f"emulation: {emulation.missing()}")
    emulation.use(emulation.compile_for_cpu(), monkeypatch)
    monkeypatch.setattr(prefill_tiles, "_PIECE_TILES", 1)  # so that short contexts have several
    read = SafetensorsDir.read  # gives memory of the file itself, which begins where no vector does
    monkeypatch.setattr(SafetensorsDir, "read", lambda *arguments: read(*arguments).clone())


def on_kernels(path: Path) -> tuple[Engine, Capture]:
    part = load_part(path, torch.bfloat16, CPU, 16 * KV_BYTES, max_model_len=512, deterministic=True)
    capture = Capture()
    with torch.inference_mode():
        part.kv_cache.pool.fill_(float("nan"))  # what is read and was not written shows
        engine = Engine(part.model, part.kv_cache, part.max_model_len, 8)
        engine.executor = Executor(part.model, part.kv_cache, 8, 512 // 16, capture)
    return engine, capture


@pytest.mark.parametrize(("family", "window"), [("Llama", None), ("Mistral", 150)])
@settings(max_examples=1, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 20), way=WAYS)
def test_on_kernels_with_graphs_and_without(
    seed: int,
    way: Way,
    family: str,
    window: int | None,
    checkpoint: Callable[..., Path],
    emulated: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {} if window is None else {"sliding_window": window}
    path = checkpoint(family, head_dim=64, intermediate_size=128, vocab_size=208, **changes)
    engine, capture = on_kernels(path)
    assert engine.executor._model.head.part.invariant, "products of the CPU's library"
    check(engine, seed, 300, way, monkeypatch)
    assert capture.replayed > 0
