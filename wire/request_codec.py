"""Protobuf <-> core for one sequence as a worker takes it. As in `codec.py`, which carries it in commands."""

import math
from collections.abc import Mapping
from typing import Literal

from ..core.errors import InvalidRequest
from ..core.ids import SequenceId
from ..core.request import MAX_LOGPROBS, MAX_PRIORITY, MAX_PROMPT_LOGPROBS, Request, Sampling
from ..v1 import link_pb2
from . import bounds


def decode_sequence_id(value: str) -> SequenceId:
    return SequenceId(bounds.identifier(value, "sequence_id"))


def milliseconds(seconds: float) -> int:
    """Rounded up, but for what the multiplication itself adds: 524.287 s are 524287 ms."""
    return math.ceil(round(seconds * 1000, 3))


def encode_sampling(sampling: Sampling) -> link_pb2.Sampling:
    return link_pb2.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        branch=sampling.branch,
        stop_token_ids=sorted(sampling.stop_token_ids),
        logprobs=sampling.logprobs,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_tokens,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def decode_sampling(message: link_pb2.Sampling) -> Sampling:
    top_p = bounds.number(message.top_p, "top_p", high=1.0)
    if top_p == 0.0:
        raise InvalidRequest("top_p must be above 0")
    max_tokens = bounds.at_most(message.max_tokens, bounds.MAX_TOKEN_ID, "max_tokens", least=1)
    repetition = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    if repetition == 0.0:
        raise InvalidRequest("repetition_penalty must be above 0")
    return Sampling(
        max_tokens=max_tokens,
        temperature=bounds.number(message.temperature, "temperature"),
        top_p=top_p,
        top_k=bounds.at_most(message.top_k, bounds.MAX_TOKEN_ID, "top_k"),
        min_p=bounds.number(message.min_p, "min_p", high=1.0),
        seed=message.seed,
        branch=bounds.at_most(message.branch, bounds.MAX_ITEMS, "branch"),
        stop_token_ids=frozenset(bounds.integers(message.stop_token_ids, "stop_token_ids", bounds.MAX_STOP_TOKENS)),
        logprobs=_decode_count(message, "logprobs"),
        repetition_penalty=bounds.number(repetition, "repetition_penalty", high=bounds.MAX_LOGIT_EDIT),
        presence_penalty=_logit_edit(message.presence_penalty, "presence_penalty"),
        frequency_penalty=_logit_edit(message.frequency_penalty, "frequency_penalty"),
        logit_bias=_decode_logit_bias(message.logit_bias),
        min_tokens=bounds.at_most(message.min_tokens, max_tokens, "min_tokens"),
        prompt_logprobs=_decode_count(message, "prompt_logprobs"),
    )


def _decode_count(message: link_pb2.Sampling, field: Literal["logprobs", "prompt_logprobs"]) -> int | None:
    """How many log probabilities are asked for; None: none."""
    return bounds.at_most(getattr(message, field), MAX_LOGPROBS, field) if message.HasField(field) else None


def _decode_logit_bias(biases: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    bounds.integers(tuple(biases), "logit_bias", bounds.MAX_LOGIT_BIASES)
    return tuple((token, _logit_edit(bias, "logit_bias")) for token, bias in sorted(biases.items()))


def _logit_edit(value: float, field: str) -> float:
    return bounds.number(value, field, low=-bounds.MAX_LOGIT_EDIT, high=bounds.MAX_LOGIT_EDIT)


def encode_request(request: Request) -> link_pb2.Admit:
    timeout_ms = 0  # none; a deadline is rounded up, so that it never becomes none
    if request.timeout_s is not None:
        timeout_ms = min(max(1, milliseconds(request.timeout_s)), bounds.MAX_TIMEOUT_MS)
    return link_pb2.Admit(
        sequence_id=request.sequence_id,
        prompt=request.prompt,
        sampling=encode_sampling(request.sampling),
        timeout_ms=timeout_ms,
        traceparent=request.traceparent,
        salt=request.salt,
        number=request.number,
        priority=request.priority,
        tenant=request.tenant,
    )


def decode_admit(message: link_pb2.Admit) -> Request:
    if not message.prompt:
        raise InvalidRequest("prompt must hold a token")
    timeout_ms = bounds.at_most(message.timeout_ms, bounds.MAX_TIMEOUT_MS, "timeout_ms")
    sampling = decode_sampling(message.sampling)
    if sampling.prompt_logprobs is not None:
        asked = len(message.prompt) * (1 + sampling.prompt_logprobs)
        bounds.at_most(asked, MAX_PROMPT_LOGPROBS, "prompt tokens times (1 + prompt_logprobs)")
    return Request(
        sequence_id=decode_sequence_id(message.sequence_id),
        prompt=bounds.integers(message.prompt, "prompt", bounds.MAX_PROMPT_TOKENS),
        sampling=sampling,
        timeout_s=timeout_ms / 1000 if timeout_ms else None,
        traceparent=bounds.text(message.traceparent, "traceparent", bounds.MAX_ID_BYTES),
        salt=bounds.text(message.salt, "salt", bounds.MAX_ID_BYTES),
        number=message.number,
        priority=bounds.at_most(message.priority, MAX_PRIORITY, "priority", least=-MAX_PRIORITY),
        tenant=bounds.text(message.tenant, "tenant", bounds.MAX_ID_BYTES),
    )
