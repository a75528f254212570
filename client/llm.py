"""`LLM`: lists of prompts to lists of results, by an engine in this process or by a running cluster.

    with LLM("/models/Qwen3-0.6B") as llm:                        # or LLM(address="127.0.0.1:50051")
        for result in llm.generate(["A dictionary maps", "A list"], SamplingParams(max_tokens=32)):
            print(result.text)

Both check and settle a request by the same code, and draw the same tokens for the same seed.
"""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from ..core.errors import ConfigError, InvalidRequest
from ..core.sampling_params import SamplingParams
from ..text.model_source import BUNDLED_MODEL
from ..text.settling import SamplingDraft, draft_sampling, settle
from .by_address import DEFAULT_IN_FLIGHT, ByAddress
from .jobs import AnyMessage, AnyPrompt, Backend, Job, about, is_chat, list_of, spread
from .progress import ProgressLine
from .results import Prompt, Result


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine of this process is set up."""

    dtype: str = "auto"  # the checkpoint's; or "bfloat16", "float32"
    device: str = "auto"  # a GPU where there is one; else as torch names it
    kv_memory: int | None = None  # bytes; None: a part of what is free
    max_model_len: int | None = None  # tokens of prompt and answer; None: what the model allows
    max_batch: int = 256  # sequences in a step
    block_tokens: int = 16
    tensor_parallel: int = 1
    policy: str = "hybrid"  # who goes first
    threads: int | None = None  # of torch on the CPU, for the whole process; None: as they are
    deterministic: bool = False  # logits do not depend on what else runs, to the last bit


class LLM:
    """Threads may share it; their calls run one after the other."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        address: str | None = None,
        api_key: str | None = None,
        tls_ca: bytes | None = None,
        timeout_s: float = 600.0,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        seed: int | None = None,
        dtype: str = EngineOptions.dtype,
        device: str = EngineOptions.device,
        kv_memory: int | None = None,
        max_model_len: int | None = None,
        max_batch: int = EngineOptions.max_batch,
        block_tokens: int = EngineOptions.block_tokens,
        tensor_parallel: int = 1,
        policy: str = EngineOptions.policy,
        threads: int | None = None,
        deterministic: bool = False,
    ) -> None:
        """Without `address`: loads `model`, a directory or a Hugging Face id (None: the one that comes with Baton).

        With it: asks the cluster there for `model` (None: the one it serves), `max_in_flight` requests at once, each
        for `timeout_s` seconds at most; how its engines are set up is the cluster's matter. seed: of the seeds that
        requests without their own get, in order; None: they differ each time. Raises ConfigError.
        """
        options = EngineOptions(
            dtype=dtype,
            device=device,
            kv_memory=kv_memory,
            max_model_len=max_model_len,
            max_batch=max_batch,
            block_tokens=block_tokens,
            tensor_parallel=tensor_parallel,
            policy=policy,
            threads=threads,
            deterministic=deterministic,
        )
        self._lock = threading.Lock()
        self._seeds = random.Random(seed)  # noqa: S311  # no secret
        self._backend: Backend
        if address is None:
            self._backend = _in_process(model or BUNDLED_MODEL, options)
        elif options != EngineOptions():
            raise ConfigError("with an address, the engines are the cluster's: set them up in `baton serve`")
        else:
            name = "" if model is None else str(model)
            self._backend = ByAddress(
                address, name, api_key=api_key, tls_ca=tls_ca, timeout_s=timeout_s, max_in_flight=max_in_flight
            )

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Result]:
        """One result per prompt, in order. A prompt is text, token ids, or a conversation. sampling_params: for all, or
        one per prompt. progress: shown on standard error where that is a terminal.

        What can't be run is refused before anything runs: InvalidRequest or ContextExceeded, naming the prompt by its
        index. Ctrl-C ends what runs; the next call may come then.
        """
        many = list_of(prompts)
        wanted = spread(sampling_params, len(many))
        with self._lock:
            jobs = self._jobs(many, wanted)
            with ProgressLine(len(jobs), shown=progress) as line:
                return self._backend.run(jobs, line)

    def chat(
        self,
        conversations: Sequence[AnyMessage] | Sequence[Sequence[AnyMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Result]:
        """The same for one conversation, or a list of them."""
        for index, prompt in enumerate(many := list_of(conversations)):
            with about(index):
                if not is_chat(prompt):
                    raise InvalidRequest("a conversation is a list of chat messages")
        return self.generate(many, sampling_params, progress=progress)

    def tokenize(self, prompt: AnyPrompt) -> list[int]:
        """Tokens of one text, or of one conversation as the model's chat template renders it."""
        many = list_of(prompt)
        if len(many) != 1:
            raise InvalidRequest("give one prompt")
        with self._lock:
            return list(self._backend.tokenise(many)[0])

    def close(self) -> None:
        """Ends what the model's chat template and a connection run in. An engine's memory goes with the object."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _jobs(self, prompts: Sequence[Prompt], wanted: Sequence[SamplingParams]) -> list[Job]:
        if not prompts:
            return []
        limits, defaults = self._backend.limits, self._backend.defaults
        drafts: dict[int, SamplingDraft] = {}  # by identity: most often all prompts share one
        for index, params in enumerate(wanted):
            if id(params) not in drafts:
                with about(index):
                    drafts[id(params)] = draft_sampling(params, limits, defaults)
        jobs = []
        for index, token_ids in enumerate(self._backend.tokenise(prompts)):
            draft = drafts[id(wanted[index])]
            seed = self._seeds.getrandbits(63) if draft.seed is None else draft.seed
            with about(index):
                samplings = settle(draft, len(token_ids), seed, limits, defaults)
            jobs.append(
                Job(
                    index=index,
                    prompt=prompts[index],
                    token_ids=token_ids,
                    params=replace(wanted[index], seed=seed),
                    samplings=tuple(samplings),
                    stops=draft.stops,
                )
            )
        return jobs


def _in_process(model: str | Path, options: EngineOptions) -> Backend:
    if options.tensor_parallel != 1:
        raise ConfigError(f"tensor_parallel is {options.tensor_parallel}: this version runs one rank; leave it at 1")
    try:
        from .in_process import InProcess  # noqa: PLC0415  # torch: only where an engine runs
    except ModuleNotFoundError as error:
        raise ConfigError(f"an engine needs {error.name}: pip install 'baton-llm[worker]'") from error
    return InProcess(
        model,
        dtype=options.dtype,
        device=options.device,
        kv_bytes=options.kv_memory,
        block_tokens=options.block_tokens,
        max_model_len=options.max_model_len,
        max_batch=options.max_batch,
        policy=options.policy,
        threads=options.threads,
        deterministic=options.deterministic,
    )
