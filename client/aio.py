"""The client for asyncio."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio

from ..core.errors import BatonError, DeadlineExceeded, Unavailable
from ..v1 import inference_pb2 as pb
from ..v1 import inference_pb2_grpc as rpc
from . import codec
from .channel import DEFAULT_ADDRESS, OPTIONS, credentials, metadata
from .errors import STREAM_BROKE, NoAnswer, from_status
from .results import ChatMessage, Collector, Explanation, Generation, Message, ModelInfo, Prompt, Sampling, Worker
from .retry import Retry, StreamProgress

T = TypeVar("T")


class AsyncInferenceClient:
    """Calls a router from one event loop. Every call ends within `timeout_s` seconds, retries included."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls_ca: bytes | None = None,
        timeout_s: float = 600.0,
        retry: Retry | None = None,
    ) -> None:
        secure = credentials(tls_ca)
        self._channel = (
            grpc.aio.secure_channel(address, secure, options=OPTIONS)
            if secure
            else grpc.aio.insecure_channel(address, options=OPTIONS)
        )
        self._stub = rpc.InferenceServiceStub(self._channel)
        self._metadata = metadata(api_key)
        self._timeout_s = timeout_s
        self._retry = retry or Retry()

    async def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        sampling: Sampling | None = None,
        request_id: str = "",
        priority: int = 0,
        resume_after_seq: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Message, None]:
        """Yields the answer as it comes, each token once, whatever breaks in between. Closing it cancels the call.

        To go on with an earlier client's stream, give its `request_id`, its sampling with the seed, and its last `seq`.
        `priority`: from -100 to 100; larger goes first, as far as the workers' policy looks at it.
        """
        request_id = request_id or codec.new_request_id()
        settled = codec.settle_seed(sampling)
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        progress = StreamProgress(self._retry, settled.n or 1, resume_after_seq)
        while not progress.ended:
            request = codec.encode_generate(request_id, model, prompt, settled, priority, progress.seq)
            try:
                async with aclosing(self._try_stream(request, progress, deadline)) as messages:
                    async for message in messages:
                        yield message
            except BatonError as error:
                wait_s = progress.after(error)
                if wait_s is None:
                    raise
                await asyncio.sleep(max(0.0, min(wait_s, deadline - time.monotonic())))

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        sampling: Sampling | None = None,
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Generation:
        """The whole answer, put together from its stream."""
        collector = Collector()
        async for message in self.stream(
            prompt, model=model, sampling=sampling, request_id=request_id, priority=priority, timeout_s=timeout_s
        ):
            collector.add(message)
        return collector.result()

    async def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        model: str = "",
        sampling: Sampling | None = None,
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Generation:
        """The whole answer to a conversation."""
        return await self.generate(
            messages, model=model, sampling=sampling, request_id=request_id, priority=priority, timeout_s=timeout_s
        )

    async def tokenize(self, prompt: str | Sequence[ChatMessage], *, model: str = "") -> list[int]:
        request = codec.encode_tokenize(model, prompt)
        answer = await self._call(lambda s: self._stub.Tokenize(request, timeout=s, metadata=self._metadata))
        return list(answer.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        request = codec.encode_detokenize(model, token_ids)
        answer = await self._call(lambda s: self._stub.Detokenize(request, timeout=s, metadata=self._metadata))
        return str(answer.text)

    async def models(self) -> list[ModelInfo]:
        request = pb.ListModelsRequest()
        answer = await self._call(lambda s: self._stub.ListModels(request, timeout=s, metadata=self._metadata))
        return [codec.decode_model(model) for model in answer.models]

    async def model(self, name: str = "") -> ModelInfo:
        request = pb.GetModelRequest(model=name)
        answer = await self._call(lambda s: self._stub.GetModel(request, timeout=s, metadata=self._metadata))
        return codec.decode_model(answer.model)

    async def workers(self, model: str = "") -> list[Worker]:
        """Those that serve the model, as the router sees them."""
        request = pb.GetModelRequest(model=model)
        answer = await self._call(lambda s: self._stub.GetModel(request, timeout=s, metadata=self._metadata))
        return [codec.decode_worker(worker) for worker in answer.workers]

    async def cancel(self, request_id: str) -> bool:
        """Ends a request. False: the router does not know it, or no longer. Cancelling twice changes nothing."""
        request = pb.CancelRequest(request_id=request_id)
        answer = await self._call(lambda s: self._stub.Cancel(request, timeout=s, metadata=self._metadata))
        return bool(answer.found)

    async def explain(self, request_id: str) -> Explanation:
        """Where a request was placed and how long each part took. Raises UnknownRequest."""
        request = pb.ExplainRequest(request_id=request_id)
        answer = await self._call(lambda s: self._stub.Explain(request, timeout=s, metadata=self._metadata))
        return codec.decode_explanation(answer)

    async def close(self) -> None:
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _try_stream(
        self, request: pb.GenerateRequest, progress: StreamProgress, deadline: float
    ) -> AsyncGenerator[Message, None]:
        call = self._stub.Generate(request, timeout=_left(deadline), metadata=self._metadata)
        try:
            with _typed_errors():
                async for response in call:
                    message = progress.take(codec.decode_message(response))
                    if message is not None:
                        yield message
        finally:
            call.cancel()  # nothing after the end; else the reader has left
        if not progress.ended:
            raise NoAnswer(STREAM_BROKE)

    async def _call(self, invoke: Callable[[float], Awaitable[T]]) -> T:
        """One call, repeated while the router is away: each of these changes nothing the second time."""
        deadline = time.monotonic() + self._timeout_s
        failures = 0
        while True:
            try:
                with _typed_errors():
                    return await invoke(_left(deadline))
            except Unavailable:
                failures += 1
                if failures >= self._retry.tries:
                    raise
                await asyncio.sleep(max(0.0, min(self._retry.delay_s(failures), deadline - time.monotonic())))


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_status(error.code(), error.details(), error.trailing_metadata()) from None


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("The time for this call is up.")
    return left
