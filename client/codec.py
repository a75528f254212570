"""Between the client's dataclasses and protobuf."""

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import replace

from ..core.errors import InvalidRequest
from ..core.request import FinishReason, PromptLogprob, TokenLogprobs
from ..core.sampling_params import SCALARS
from ..v1 import inference_pb2 as pb
from .results import ChatMessage, Explanation, Message, ModelInfo, Output, Prompt, Sampling, Usage, Worker

_FINISH = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}


def new_request_id() -> str:
    return uuid.uuid4().hex


def settle_seed(sampling: Sampling | None) -> Sampling:
    """A repeated request must draw the same tokens also from a router that never saw it, so the seed is set here."""
    sampling = sampling or Sampling()
    return sampling if sampling.seed is not None else replace(sampling, seed=secrets.randbits(63))


def encode_generate(
    request_id: str, model: str, prompt: Prompt, sampling: Sampling, priority: int, seq: int
) -> pb.GenerateRequest:
    """Raises InvalidRequest for a value that does not even fit its field, such as a negative count."""
    try:
        request = pb.GenerateRequest(
            request_id=request_id, model=model, sampling=_sampling(sampling), priority=priority
        )
        if isinstance(prompt, str):
            request.text = prompt
        elif _is_chat(prompt):
            request.chat.CopyFrom(_chat(prompt))
        else:
            request.token_ids.ids.extend(_ids(prompt))
            request.token_ids.SetInParent()
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"The request holds a value that its field can't take: {error}.") from None
    if seq:
        request.stream.resume_after_seq = seq
    return request


def encode_tokenize(model: str, prompt: Prompt) -> pb.TokenizeRequest:
    if isinstance(prompt, str):
        return pb.TokenizeRequest(model=model, text=prompt)
    if not _is_chat(prompt):
        raise InvalidRequest("Only text or a conversation can be tokenised.")
    return pb.TokenizeRequest(model=model, chat=_chat(prompt))


def encode_detokenize(model: str, token_ids: Sequence[int]) -> pb.DetokenizeRequest:
    try:
        return pb.DetokenizeRequest(model=model, token_ids=token_ids)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"Token ids are whole numbers from 0 on: {error}.") from None


def decode_message(response: pb.GenerateResponse) -> Message:
    return Message(
        request_id=response.request_id,
        seq=response.seq,
        outputs=tuple(_output(output) for output in response.outputs),
        usage=_usage(response.usage) if response.HasField("usage") else None,
    )


def decode_model(model: pb.Model) -> ModelInfo:
    return ModelInfo(
        name=model.name,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        fingerprint=model.fingerprint,
        ready=model.ready,
    )


def decode_worker(worker: pb.Worker) -> Worker:
    return Worker(
        worker_id=worker.worker_id,
        role=worker.role,
        draining=worker.draining,
        running=worker.running,
        waiting=worker.waiting,
        free_blocks=worker.free_blocks,
        total_blocks=worker.total_blocks,
    )


def decode_explanation(response: pb.ExplainResponse) -> Explanation:
    return Explanation(
        request_id=response.request_id,
        state=response.state,
        trace_id=response.trace_id,
        seed=response.seed,
        prompt_tokens=response.prompt_tokens,
        completion_tokens=response.completion_tokens,
        cached_tokens=response.cached_tokens,
        prefill_worker=response.prefill_worker,
        decode_worker=response.decode_worker,
        queued_ms=response.queued_ms,
        first_token_ms=response.first_token_ms,
        total_ms=response.total_ms,
        placement=response.placement,
    )


def _sampling(sampling: Sampling) -> pb.SamplingParams:
    given = {name: getattr(sampling, name) for name in SCALARS if getattr(sampling, name) is not None}
    return pb.SamplingParams(
        **given, stop=sampling.stops, stop_token_ids=sampling.stop_token_ids, logit_bias=dict(sampling.logit_bias or {})
    )


def _is_chat(prompt: Prompt) -> bool:
    return bool(prompt) and all(isinstance(part, ChatMessage) for part in prompt)


def _chat(prompt: Prompt) -> pb.Chat:
    messages = [part for part in prompt if isinstance(part, ChatMessage)]
    return pb.Chat(messages=[pb.ChatMessage(role=part.role, content=part.content) for part in messages])


def _ids(prompt: Prompt) -> list[int]:
    ids = [part for part in prompt if isinstance(part, int)]
    if len(ids) != len(prompt):
        raise TypeError("a prompt is text, token ids or chat messages")
    return ids


def _output(output: pb.Output) -> Output:
    return Output(
        index=output.index,
        text=output.text,
        token_ids=tuple(output.token_ids),
        finish_reason=_FINISH.get(output.finish_reason),
        logprobs=tuple(
            TokenLogprobs(entry.logprob, tuple((top.token_id, top.logprob) for top in entry.top))
            for entry in output.logprobs
        ),
        prompt_logprobs=tuple(
            PromptLogprob(
                token_id=entry.token_id,
                logprob=entry.logprob if entry.HasField("logprob") else None,
                top=tuple((top.token_id, top.logprob) for top in entry.top),
            )
            for entry in output.prompt_logprobs
        ),
    )


def _usage(usage: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
