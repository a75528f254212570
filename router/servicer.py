"""The gRPC door: decode, call, encode."""

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from ..core.errors import InvalidRequest
from ..core.request import FinishReason
from ..text.settling import check_chat, check_token_ids
from ..v1 import inference_pb2 as pb
from ..v1 import inference_pb2_grpc
from ..wire.codec import encode_logprobs, encode_prompt_logprobs
from ..wire.interceptors import authorization_of, timeout_of, traceparent_of
from .fleet import ServedModel
from .inference import Inference
from .placement import Role, WorkerView
from .records import Message, Record, Usage
from .tenants import tenant_of
from .validation import Prompt

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, inference: Inference, *, keyed: bool = False) -> None:
        """`keyed`: an interceptor lets in only who brings an API key."""
        self._inference = inference
        self._keyed = keyed

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        tenant = tenant_of(authorization_of(context)) if self._keyed else ""
        submitted = self._inference.submit(request, timeout_of(context), traceparent_of(context), tenant)
        record, drafted = submitted.record, submitted.draft
        with record.attached() as reader:
            async for message in reader.messages(drafted.resume_after_seq, drafted.final_only):
                yield encode_message(record, message)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        self._inference.model(request.model)
        match request.WhichOneof("input"):
            case "text":
                prompt = Prompt(text=request.text)
            case "chat":
                prompt = Prompt(messages=check_chat(request.chat.messages))
            case _:
                raise InvalidRequest("an input is missing: give text or chat")
        return pb.TokenizeResponse(token_ids=await self._inference.tokenise(prompt))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        model = self._inference.model(request.model)
        ids = check_token_ids("token_ids", request.token_ids, model.vocab_size)
        return pb.DetokenizeResponse(text=await self._inference.detokenise(ids))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        return pb.ListModelsResponse(models=[encode_model(self._inference.model(), self._inference.ready)])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        model = self._inference.model(request.model)
        roles = list(Role)
        views = sorted(self._inference.workers(), key=lambda view: (roles.index(view.role), view.worker_id))
        workers = [encode_worker(view) for view in views]
        return pb.GetModelResponse(model=encode_model(model, self._inference.ready), workers=workers)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:  # noqa: N802
        return pb.CancelResponse(found=self._inference.cancel(request.request_id))

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:  # noqa: N802
        return encode_explanation(self._inference.record(request.request_id))


def encode_message(record: Record, message: Message) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=record.request_id,
        seq=message.seq,
        outputs=[
            pb.Output(
                index=delta.index,
                text=delta.text,
                token_ids=delta.token_ids,
                finish_reason=_FINISH[delta.finish],
                logprobs=encode_logprobs(delta.logprobs) if delta.logprobs else None,
                prompt_logprobs=encode_prompt_logprobs(delta.prompt_logprobs) if delta.prompt_logprobs else None,
            )
            for delta in message.outputs
        ],
        usage=None if message.usage is None else encode_usage(message.usage),
    )


def encode_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def encode_model(model: ServedModel, ready: bool) -> pb.Model:
    return pb.Model(
        name=model.name,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        fingerprint=model.fingerprint,
        ready=ready,
    )


def encode_worker(view: WorkerView) -> pb.Worker:
    return pb.Worker(
        worker_id=view.worker_id,
        role=view.role,
        draining=view.draining,
        running=view.running,
        waiting=view.waiting,
        free_blocks=max(0, view.free_blocks),
        total_blocks=view.total_blocks,
    )


def encode_explanation(record: Record) -> pb.ExplainResponse:
    course = record.course
    now = record.clock() if course.ended is None else course.ended

    def since_arrival_ms(moment: float | None) -> float:
        return 0.0 if moment is None else (moment - course.arrived) * 1000

    return pb.ExplainResponse(
        request_id=record.request_id,
        state=course.state,
        trace_id=course.trace_id,
        seed=course.seed,
        prompt_tokens=course.prompt_tokens,
        completion_tokens=record.seq,
        cached_tokens=course.cached_tokens,
        prefill_worker=course.prefill_worker,
        decode_worker=course.decode_worker,
        queued_ms=since_arrival_ms(now if course.placed is None else course.placed),
        first_token_ms=since_arrival_ms(course.first_token),
        total_ms=since_arrival_ms(now),
        placement=course.placement,
    )
