"""Who serves: Baton's engine, and transformers in both of its ways. All in this process, greedy, no end of sequence.

A side has variants to choose from (threads, batch sizes); `open` makes one ready to serve waves of jobs. A served wave
is, for each job, when each of its tokens was there: seconds since the wave began. [new_tokens] f64 each.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.engine import Engine
from baton.engine.policies import policy
from baton.engine.sequence import Sequence

from .workloads import Job, Workload

STEP_TOKENS = 512  # of a step at most, where a side works in steps
KV_BYTES = 1 << 29
BLOCK_TOKENS = 16

Times = list[np.ndarray]
Serve = Callable[[tuple[Job, ...]], Times]


@dataclass(frozen=True)
class Variant:
    threads: int  # of torch
    batch: int = 0  # sequences at once; 0: as the side likes

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)}" + f", batches of {self.batch}" * bool(self.batch)


class Side(Protocol):
    name: str

    def variants(self, work: Workload) -> list[Variant]:
        """All with one thread."""

    def open(self, variant: Variant, work: Workload) -> AbstractContextManager[Serve]: ...


def batch_sizes(width: int) -> list[int]:
    """All at once, a half, a quarter, an eighth."""
    return sorted({max(width // part, 1) for part in (1, 2, 4, 8)}, reverse=True)


class Baton:
    """The engine alone: prompts in chunks beside the sequences that decode."""

    name = "Baton"

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        self.engine = Engine.build(model_dir, dtype, torch.device("cpu"), KV_BYTES, block_tokens=BLOCK_TOKENS)
        self._batch = ContinuousBatch(self.engine, policy("hybrid"), step_tokens=STEP_TOKENS)

    def variants(self, work: Workload) -> list[Variant]:
        return [Variant(1)]

    @contextmanager
    def open(self, variant: Variant, work: Workload) -> Iterator[Serve]:
        torch.set_num_threads(variant.threads)
        yield self.serve

    def serve(self, jobs: tuple[Job, ...], keep_cached: bool = False) -> Times:
        """keep_cached: what the jobs computed stays in the prefix cache after."""
        begin = time.perf_counter()
        times: dict[Sequence, list[float]] = {}
        for number, job in enumerate(jobs):
            sampling = Sampling(max_tokens=job.new_tokens, temperature=0.0)
            seq = Sequence(SequenceId(f"{number}/0"), job.prompt, sampling)
            times[seq] = []
            self._batch.add(seq, begin)
        while (result := self._batch.step(time.perf_counter())) is not None:
            now = time.perf_counter() - begin
            for seq, _, _ in result.tokens:
                times[seq].append(now)
        if not keep_cached:
            self.engine.ledger.drop_cached()
        return [np.array(one) for one in times.values()]


def load_peer(model_dir: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # else `generate` takes the model's
    return model


class StaticBatches:
    """`model.generate` on left-padded batches, one after the other, each as long as its longest answer."""

    name = "transformers, static"

    def __init__(self, model: Any) -> None:
        self._model = model

    def variants(self, work: Workload) -> list[Variant]:
        return [Variant(1, size) for size in batch_sizes(work.width)]

    @contextmanager
    def open(self, variant: Variant, work: Workload) -> Iterator[Serve]:
        torch.set_num_threads(variant.threads)

        def serve(jobs: tuple[Job, ...]) -> Times:
            begin = time.perf_counter()
            batches = [jobs[at : at + variant.batch] for at in range(0, len(jobs), variant.batch)]
            return [times for batch in batches for times in self._generate(batch, begin)]

        yield serve

    def _generate(self, jobs: tuple[Job, ...], begin: float) -> Times:
        width, longest = max(len(job.prompt) for job in jobs), max(job.new_tokens for job in jobs)
        ids = torch.tensor([[0] * (width - len(job.prompt)) + list(job.prompt) for job in jobs])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        watch = _Watch()
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=0, streamer=watch
            )
        assert out.shape[1] == width + longest, "an end of sequence was looked at"
        steps = np.array(watch.times[1:]) - begin  # the first call brings the prompt
        return [steps[: job.new_tokens] for job in jobs]


class _Watch:
    """A streamer that looks at the clock."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, token_ids: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


class ContinuousBatches:
    """`transformers`' own continuous batching: paged KV, one packed row of tokens a step.

    sdpa attention (its flash kernels need a GPU; eager was slower), no prefix sharing (nothing is shared, and a second
    round would find the first's), no compilation (each step has another shape: a tenth of the tokens/s). Its mask is
    [tokens of the step, KV of all sequences], so fewer sequences at once may be faster.
    """

    name = "transformers, continuous"

    def __init__(self, model: Any) -> None:
        self._model = model

    def variants(self, work: Workload) -> list[Variant]:
        return [Variant(1, size) for size in batch_sizes(work.width)]

    @contextmanager
    def open(self, variant: Variant, work: Workload) -> Iterator[Serve]:
        torch.set_num_threads(variant.threads)  # before its thread starts, which takes the number over
        with torch.inference_mode():
            manager = self._manager(variant, work)
            manager.warmup()  # makes the KV pool
            manager.start()
            try:
                yield lambda jobs: _continuously(manager, jobs)
            finally:
                manager.stop(block=True)
                manager.destroy()

    def _manager(self, variant: Variant, work: Workload) -> Any:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        settings = ContinuousBatchingConfig(
            page_size=BLOCK_TOKENS,
            num_blocks=(-(-work.longest // BLOCK_TOKENS) + 1) * work.width,  # no sequence ever waits for a block
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=variant.batch,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
            use_async_batching=False,
            cpu_offload_space=0.0,
        )
        return self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=settings,
        )


def _continuously(manager: Any, jobs: tuple[Job, ...]) -> Times:
    begin = time.perf_counter()
    asked = [
        manager.add_request(list(job.prompt), max_new_tokens=job.new_tokens, record_timestamps=True, eos_token_id=-1)
        for job in jobs
    ]
    answers: dict[str, Any] = {}
    while len(answers) < len(jobs):
        answer = manager.get_result(timeout=1)
        if answer is None and not manager.is_running():
            raise RuntimeError(f"continuous batching ended: {manager.background_thread_status.fatal_error}")
        if answer is not None and answer.is_finished():
            assert answer.error is None, answer.error
            answers[answer.request_id] = answer
    for name, job in zip(asked, jobs, strict=True):
        assert len(answers[name].generated_tokens) == job.new_tokens, "an end of sequence was looked at"
    return [np.array(answers[name].timestamps) - begin for name in asked]
