"""An engine that runs a list of requests in the caller's own thread, until all of them have ended.

    offline = Offline.build(model_dir)
    offline.run(requests, on_step)     # on_step sees each step's tokens and ends, and may end sequences early

Whatever breaks a run off, an error of `on_step` or Ctrl-C, every block is back after it and the next run may come.
There is no text here.
"""

import signal
import threading
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from time import monotonic
from types import FrameType, TracebackType
from typing import Self

import torch

from ..core.errors import ConfigError, Unavailable
from ..core.ids import SequenceId
from ..core.request import Request
from .continuous_batch import ContinuousBatch
from .cpu import computes_bfloat16
from .engine import Engine
from .kv_cache import DTYPES
from .memory import GPU_LEAST, cpu_kv_bytes, default_swap_bytes, free_memory, kv_room, usable_bytes
from .models import ModelConfig
from .models.safetensors_file import SafetensorsDir
from .policies import policy as policy_named
from .sequence import Sequence
from .step_result import StepResult

_LIVING_PER_PLACE = 4  # sequences in the batch's care: enough for its policy to choose among, few enough for memory


class Offline:
    """One thread at a time."""

    def __init__(self, engine: Engine, batch: ContinuousBatch, clock: Callable[[], float] = monotonic) -> None:
        """`batch` is over `engine`, and nobody else's."""
        self.engine = engine
        self._batch = batch
        self._clock = clock
        self._max_living = _LIVING_PER_PLACE * engine.max_batch
        self._broken = False

    @classmethod
    def build(
        cls,
        model_dir: Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        kv_bytes: int | None = None,
        block_tokens: int = 16,
        max_model_len: int | None = None,
        max_batch: int = 256,
        policy: str = "hybrid",
        threads: int | None = None,
        deterministic: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Load a model. "auto" is the checkpoint's dtype, or float32 on a CPU that has no bfloat16, and a GPU where
        there is one. kv_bytes None: a part of what is free; a part of the host's memory, too, takes the KV of preempted
        sequences. The rest as `Engine.build` takes it. Raises ConfigError in words for whoever wrote the call."""
        try:
            order = policy_named(policy)
            config = ModelConfig.from_dir(model_dir)
            where = _device(device)
            runs = _run_dtype(dtype, config, where)
            context = max_model_len or config.max_position_embeddings
            room = settle_kv_bytes(model_dir, config, runs, where, kv_bytes, -(-context // block_tokens) * block_tokens)
            engine = Engine.build(
                model_dir,
                runs,
                where,
                room,
                block_tokens,
                max_model_len,
                max_batch,
                threads,
                progress,
                deterministic=deterministic,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        # A pool on the CPU is not in what is free: its pages are taken only as they are written.
        spare = free_memory() - (0 if where.type == "cuda" else room)
        swap_bytes = min(room, default_swap_bytes(max(0, spare)))
        return cls(engine, ContinuousBatch(engine, order, swap_bytes=swap_bytes))

    def run(self, requests: Iterable[Request], on_step: Callable[[StepResult], Iterable[Sequence]]) -> None:
        """Until every request has ended. `requests` is read as there is room. `on_step` gives the sequences that are to
        end with this step; no more comes of them. It sees an end once, as the batch tells it.

        Raises what `on_step` raises, and KeyboardInterrupt between two steps; Unavailable where a step itself broke.
        """
        if self._broken:
            raise Unavailable("a step of this engine was broken off, so its state is not known: load the model again")
        coming = iter(requests)
        living: dict[SequenceId, Sequence] = {}
        with HeldInterrupts() as interrupts:
            try:
                while True:
                    for request in islice(coming, self._max_living - len(living)):
                        if request.sequence_id in living:
                            raise ValueError(f"two requests have the id {request.sequence_id}")
                        seq = living[request.sequence_id] = Sequence.of(request)
                        self._batch.add(seq, self._clock())
                    if not living:
                        return
                    result = self._step()
                    assert result is not None, "sequences wait, and none can ever start"
                    for seq, _ in result.ended:
                        del living[seq.sequence_id]
                    for seq in on_step(result):
                        if living.pop(seq.sequence_id, None) is not None:
                            self._batch.remove(seq)
                    interrupts.let_through()
            finally:
                self._clear(living)

    def _step(self) -> StepResult | None:
        try:
            return self._batch.step(self._clock())
        except BaseException:  # a second Ctrl-C, or a device out of memory
            self._broken = True
            raise

    def _clear(self, living: dict[SequenceId, Sequence]) -> None:
        if self._broken:
            return
        for seq in living.values():
            self._batch.remove(seq)
        while self._step() is not None:  # a step that was under way still holds blocks of those that left
            pass


class HeldInterrupts:
    """Ctrl-C waits until the caller lets it through. The second one does not wait. Elsewhere than on the main thread,
    which alone gets signals, it does nothing."""

    def __init__(self) -> None:
        self._before: Callable[[int, FrameType | None], object] | None = None
        self._held = False

    def __enter__(self) -> Self:
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._before = handler
            signal.signal(signal.SIGINT, self._hold)
        return self

    def let_through(self) -> None:
        if self._held and self._before is not None:
            self._held = False
            self._before(signal.SIGINT, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if kind is None:
            self.let_through()

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._held and self._before is not None:
            self._before(number, frame)
        self._held = True


def settle_kv_bytes(
    model_dir: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, given: int | None, context: int
) -> int:
    """Bytes of the KV cache: as given, else a part of what is free. One request of `context` tokens, a multiple of the
    block's, must fit. Raises ConfigError with the arithmetic."""
    weights = SafetensorsDir(model_dir).total_bytes * dtype.itemsize // config.dtype.itemsize
    one_request = context * config.num_layers * 2 * config.num_kv_heads * config.head_size * dtype.itemsize
    if device.type == "cpu" and config.tie_word_embeddings:  # the head is laid out a second time: kernels/linear.py
        weights += config.vocab_size * config.hidden_size * dtype.itemsize
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        most = kv_room(min(free, usable_bytes(total)), weights)
        room = given or max(most, GPU_LEAST)
    else:
        most = free_memory() - weights
        room = given or cpu_kv_bytes(most, one_request)
    if room < one_request:
        raise ConfigError(
            f"{_mib(room)} for KV hold no request of {context} tokens, which takes {_mib(one_request)}: give more "
            "kv_memory, or a smaller max_model_len"
        )
    if room > most:
        raise ConfigError(
            f"not enough memory: {_mib(room)} for KV beside {_mib(weights)} of weights, and {_mib(most)} are left for "
            "it: lower kv_memory or max_model_len, or choose a smaller model"
        )
    return room


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(asked)
    except RuntimeError:
        raise ConfigError(f"device is {asked!r}: it must be auto, cpu, cuda or one GPU, such as cuda:1") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {asked!r}, but no GPU is here")
    return found


def _run_dtype(asked: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    if asked == "auto":
        if device.type == "cpu" and not computes_bfloat16():
            return torch.float32
        return config.dtype if config.dtype in DTYPES.values() else torch.bfloat16
    if asked not in DTYPES:
        raise ConfigError(f"dtype is {asked!r}: it must be auto, {' or '.join(DTYPES)}")
    return DTYPES[asked]


def _mib(num_bytes: int) -> str:
    return f"{max(0, num_bytes) / (1 << 20):,.0f} MiB"
