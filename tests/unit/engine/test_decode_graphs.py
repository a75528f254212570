"""Steps that are padded and replayed give what steps of their own size give.

The kernels are those for a GPU, run on the CPU (see tests/emulation), and a capture is the function, called again.
"""

import gc
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.decode_graphs import Replay
from baton.engine.engine import Engine
from baton.engine.executor import Executor
from baton.engine.loading import load_part
from baton.engine.models.safetensors_file import SafetensorsDir
from baton.engine.policies import policy
from baton.engine.sequence import Sequence

from ...emulation import library as emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=f"emulation: {emulation.missing()}")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.use(emulation.compile_for_cpu(), monkeypatch)
    read = SafetensorsDir.read  # gives memory of the file itself, which begins where no vector does
    monkeypatch.setattr(SafetensorsDir, "read", lambda *arguments: read(*arguments).clone())


class Capture:
    """Counts what is captured and replayed. `memory` is what kernels keep between launches, as a graph knows it: by its
    address alone."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self.memory: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, run: Callable[[], None]) -> Replay:
        run()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


class Forgetful(Capture):
    """Keeps nothing of what it captured, as a CUDA graph doesn't."""

    def __call__(self, run: Callable[[], None]) -> Replay:
        super().__call__(run)
        split = inspect.getclosurevars(run).nonlocals["workspace"].split
        self.memory += [weakref.ref(split._partial), weakref.ref(split._arrived)]
        return lambda: None


def an_engine(path: Path, dtype: torch.dtype, max_batch: int, capture: Capture | None) -> Engine:
    part = load_part(path, dtype, torch.device("cpu"), 3 << 20, max_model_len=256)
    with torch.inference_mode():
        part.kv_cache.pool.fill_(float("nan"))  # what is read and was not written shows
        engine = Engine(part.model, part.kv_cache, part.max_model_len, max_batch)
        engine.executor = Executor(part.model, part.kv_cache, max_batch, 256 // 16, capture)
    return engine


def answers(engine: Engine, lengths: list[int]) -> list[list[int]]:
    sequences = [
        Sequence(
            SequenceId(f"r/{index}"),
            tuple(2 + (7 * index + 3 * at) % 200 for at in range(length)),
            Sampling(max_tokens=6 + index % 5, temperature=0.0),
        )
        for index, length in enumerate(lengths)
    ]
    batch = ContinuousBatch(engine, policy("hybrid"), step_tokens=64)
    for seq in sequences:
        batch.add(seq, 0.0)
    while batch.step(0.0) is not None:
        pass
    engine.ledger.check()
    return [seq.tokens for seq in sequences]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes"), [("Llama", {}), ("Mistral", {"sliding_window": 24}), ("Qwen3", {"head_dim": 128})]
)
def test_answers_are_those_of_steps_launched_op_by_op(
    family: str, changes: dict[str, int], dtype: torch.dtype, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint(family, **{"head_dim": 64, **changes})
    lengths = [1, 15, 16, 17, 40, 3, 90, 33, 16, 2, 31]
    capture = Capture()
    expected = answers(an_engine(path, dtype, 9, None), lengths)
    assert answers(an_engine(path, dtype, 9, capture), lengths) == expected
    assert capture.captured == 5  # for 1, 2, 4, 8 and 9 rows
    assert capture.replayed > 5


def test_what_a_graph_points_at_lives_as_long_as_its_engine(checkpoint: Callable[..., Path]) -> None:
    capture = Forgetful()
    engine = an_engine(checkpoint("Llama", head_dim=64), torch.bfloat16, 4, capture)
    gc.collect()
    assert all(memory() is not None for memory in capture.memory)
    del engine
    gc.collect()
    assert all(memory() is None for memory in capture.memory)  # so it was the engine that held them


def test_a_row_that_pads_writes_nothing_and_changes_nobody(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("Llama", head_dim=64)
    alone, padded = (an_engine(path, torch.float32, 8, capture) for capture in (None, Capture()))
    for engine in (alone, padded):
        answers(engine, [20, 5, 37])  # three rows in the graph of four
    assert torch.equal(alone.kv_cache.pool.isnan(), padded.kv_cache.pool.isnan())
    assert torch.allclose(alone.kv_cache.pool.nan_to_num(), padded.kv_cache.pool.nan_to_num(), atol=1e-5)
