"""From what a client sent to what the router works with. Pure: no clock, no I/O.

What sampling parameters may be, and how their defaults are settled, is in text/settling.py. A refusal never repeats a
client's text.
"""

import re
from dataclasses import dataclass
from hashlib import blake2b

from ..core.errors import InvalidRequest, UnknownModel
from ..core.ids import RequestId
from ..core.request import MAX_PRIORITY
from ..core.sampling_params import SCALARS, SamplingParams
from ..text.chat_template import ChatMessage
from ..text.generation_config import GenerationDefaults
from ..text.settling import ModelLimits, SamplingDraft, check_chat, check_count, check_prompt_ids, draft_sampling
from ..v1 import inference_pb2 as pb

MAX_REQUEST_ID = 128
_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is to be continued, as the client gave it: text, or one of the other two."""

    text: str = ""
    token_ids: tuple[int, ...] | None = None  # used as they are
    messages: tuple[ChatMessage, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft(SamplingDraft):
    """A valid request whose prompt is not tokenised yet."""

    request_id: RequestId  # empty: the router makes one
    digest: bytes  # of all that makes it this request and no other
    prompt: Prompt
    priority: int = 0
    resume_after_seq: int = 0
    final_only: bool = False

    @property
    def is_chat(self) -> bool:
        return self.prompt.messages is not None

    @property
    def repeatable(self) -> bool:
        """Another run gives the same tokens in the same order."""
        return self.answers == 1 and (self.seed is not None or self.sampling.temperature == 0)


def draft(request: pb.GenerateRequest, model: ModelLimits, defaults: GenerationDefaults) -> Draft:
    """Checks all that can be checked before the prompt is tokenised.

    Raises InvalidRequest, UnknownModel, or ContextExceeded for a text or `max_tokens` that can't fit.
    """
    check_model(request.model, model.name)
    wanted = draft_sampling(_params(request.sampling), model, defaults)
    resume = request.stream.resume_after_seq
    if request.request_id:
        check_request_id(request.request_id)
    elif resume:
        raise InvalidRequest("stream.resume_after_seq needs the request_id of the request to resume")
    return Draft(
        request_id=RequestId(request.request_id),
        digest=_digest(request),
        prompt=_prompt(request, model),
        max_tokens=wanted.max_tokens,
        sampling=wanted.sampling,
        seed=wanted.seed,
        answers=wanted.answers,
        stops=wanted.stops,
        priority=check_count("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY),
        resume_after_seq=resume,
        final_only=request.stream.final_only,
    )


def check_model(name: str, served: str) -> None:
    """Empty means the served model. Raises UnknownModel."""
    if name and name != served:
        raise UnknownModel(f"no model of that name is served here; the served model is {served!r}")


def check_request_id(request_id: str) -> RequestId:
    """Raises InvalidRequest."""
    if not _REQUEST_ID.match(request_id):
        raise InvalidRequest(f"request_id must be 1 to {MAX_REQUEST_ID} printable ASCII characters")
    return RequestId(request_id)


def _prompt(request: pb.GenerateRequest, model: ModelLimits) -> Prompt:
    match request.WhichOneof("input"):
        case "text":
            return Prompt(text=request.text)
        case "chat":
            return Prompt(messages=check_chat(request.chat.messages))
        case "token_ids":
            return Prompt(token_ids=check_prompt_ids(request.token_ids.ids, model))
        case _:
            raise InvalidRequest("an input is missing: give one of text, token_ids or chat")


def _params(wanted: pb.SamplingParams) -> SamplingParams:
    given = {name: getattr(wanted, name) for name in SCALARS if wanted.HasField(name)}
    return SamplingParams(**given, stop=wanted.stop, stop_token_ids=wanted.stop_token_ids, logit_bias=wanted.logit_bias)


def _digest(request: pb.GenerateRequest) -> bytes:
    """Of the request without its name and without how it is streamed."""
    body = pb.GenerateRequest()
    body.CopyFrom(request)
    body.ClearField("request_id")
    body.ClearField("stream")
    return blake2b(body.SerializeToString(deterministic=True), digest_size=16).digest()
