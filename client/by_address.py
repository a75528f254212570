"""Jobs of an `LLM`, run by a cluster. A thread with an event loop of its own keeps many requests in flight, also where
the caller has a loop that runs, as notebooks do."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import TypeVar

from ..core.errors import ConfigError, Unavailable
from ..core.request import FinishReason, TokenLogprobs
from ..text.generation_config import GenerationDefaults
from ..text.settling import ModelLimits, check_chat, check_prompt_ids
from .aio import AsyncInferenceClient
from .errors import ServerFault
from .jobs import Job, about
from .progress import ProgressLine
from .results import Answer, ChatMessage, Collector, Completion, Prompt, Result

DEFAULT_IN_FLIGHT = 256

T = TypeVar("T")
R = TypeVar("R")


class ByAddress:
    """See `Backend`. Prompts are tokenised before any is run, so that each is checked in time and its tokens are known;
    what runs are the tokens."""

    defaults = GenerationDefaults()  # the model's own are the router's to put in

    def __init__(
        self,
        address: str,
        model: str,
        *,
        api_key: str | None,
        tls_ca: bytes | None,
        timeout_s: float,
        max_in_flight: int,
    ) -> None:
        """Raises ConfigError."""
        if max_in_flight < 1:
            raise ConfigError(f"max_in_flight is {max_in_flight}: at least one request must be")
        self._model = model
        self._max_in_flight = max_in_flight
        self._limits: ModelLimits | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="baton-llm", daemon=True)
        self._thread.start()
        try:
            self._client = self._wait_for(_connect(address, api_key, tls_ca, timeout_s))
        except BaseException:
            self._stop()
            raise

    @property
    def limits(self) -> ModelLimits:
        """As the cluster tells them, asked for once. Raises UnknownModel, and Unavailable before its workers came."""
        if self._limits is None:
            info = self._wait_for(self._client.model(self._model))
            if not info.max_model_len:
                raise Unavailable("none of the cluster's workers is there yet")
            self._limits = ModelLimits(name=info.name, max_model_len=info.max_model_len, vocab_size=info.vocab_size)
        return self._limits

    def tokenise(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        limits = self.limits

        async def tokens(item: tuple[int, Prompt]) -> tuple[int, ...]:
            index, prompt = item
            with about(index):
                if isinstance(prompt, str):
                    return tuple(await self._client.tokenize(prompt, model=self._model))
                messages = [part for part in prompt if isinstance(part, ChatMessage)]
                if messages:
                    check_chat(messages)
                    return tuple(await self._client.tokenize(messages, model=self._model))
                return check_prompt_ids([part for part in prompt if isinstance(part, int)], limits)

        return self._wait_for(_each(tokens, enumerate(prompts), self._max_in_flight))

    def run(self, jobs: Sequence[Job], progress: ProgressLine) -> list[Result]:
        async def result(job: Job) -> Result:
            with about(job.index):
                return await self._run_one(job, progress)

        return self._wait_for(_each(result, jobs, self._max_in_flight))

    def close(self) -> None:
        if not self._loop.is_closed():
            self._wait_for(self._client.close())
            self._stop()

    async def _run_one(self, job: Job, progress: ProgressLine) -> Result:
        collector, began = Collector(), False
        async for message in self._client.stream(job.token_ids, model=self._model, sampling=job.params):
            collector.add(message)
            tokens = sum(len(output.token_ids) for output in message.outputs)
            progress.add(tokens_in=0 if began else len(job.token_ids), tokens_out=tokens)
            began = True
        progress.add(done=1)
        generation = collector.result()
        return Result(
            prompt=job.prompt,
            prompt_token_ids=job.token_ids,
            prompt_logprobs=tuple(
                None if entry.logprob is None else TokenLogprobs(entry.logprob, entry.top)
                for entry in generation.answers[0].prompt_logprobs
            ),
            outputs=tuple(_completion(index, answer, job) for index, answer in enumerate(generation.answers)),
            usage=generation.usage,
        )

    def _wait_for(self, work: Coroutine[object, object, T]) -> T:
        """Ctrl-C cancels it, and with it every request that is in flight."""
        if self._loop.is_closed():
            work.close()
            raise ConfigError("this LLM is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _connect(address: str, api_key: str | None, tls_ca: bytes | None, timeout_s: float) -> AsyncInferenceClient:
    """On the loop that will use it."""
    return AsyncInferenceClient(address, api_key=api_key, tls_ca=tls_ca, timeout_s=timeout_s)


async def _each(work: Callable[[T], Awaitable[R]], items: Iterable[T], at_once: int) -> list[R]:
    """Results in the order of the items. The first failure ends all others, and is raised."""
    results: dict[int, R] = {}
    coming = enumerate(items)

    async def worker() -> None:
        for index, item in coming:
            results[index] = await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [results[index] for index in sorted(results)]


def _completion(index: int, answer: Answer, job: Job) -> Completion:
    if answer.finish_reason is None:
        raise ServerFault("the answer came without an end")
    last = answer.token_ids[-1] if answer.token_ids else None
    stopped = answer.finish_reason is FinishReason.STOP and last in job.params.stop_token_ids
    return Completion(
        index=index,
        text=answer.text,
        token_ids=answer.token_ids,
        finish_reason=answer.finish_reason,
        stop_reason=last if stopped else None,
        logprobs=answer.logprobs,
    )
