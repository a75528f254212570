"""From what a client sent to what the router works with. Pure: no clock, no I/O.

Every field has a least and a greatest value, and a refusal names the field and both; it never repeats a client's text.

The context. `max_model_len` tokens hold prompt and answer together, and nothing is ever cut off silently:
- a prompt that leaves no room for one token is refused (OUT_OF_RANGE);
- a given `max_tokens` that does not fit beside the prompt is refused (OUT_OF_RANGE), as OpenAI's and vLLM's APIs do;
- an absent `max_tokens` takes the model's `max_new_tokens`, if its generation_config.json names one, cut down to what
  the prompt leaves; else all that it leaves.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from ..core.errors import ContextExceeded, InvalidRequest, UnknownModel
from ..core.ids import RequestId
from ..core.request import MAX_LOGPROBS, Sampling
from ..text.chat_template import ChatMessage
from ..text.generation_config import GenerationDefaults
from ..v1 import inference_pb2 as pb

MAX_REQUEST_ID = 128
MAX_ANSWERS = 16
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_CHAT_MESSAGES = 1024
MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 2.0
MAX_PENALTY = 2.0  # of presence and frequency, either way
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100.0  # either way
ROLES = ("system", "user", "assistant")

_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the served model allows."""

    name: str
    max_model_len: int  # tokens of prompt and answer together
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is to be continued, as the client gave it: text, or one of the other two."""

    text: str = ""
    token_ids: tuple[int, ...] | None = None  # used as they are
    messages: tuple[ChatMessage, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A valid request whose prompt is not tokenised yet."""

    request_id: RequestId  # empty: the router makes one
    digest: bytes  # of all that makes it this request and no other
    prompt: Prompt
    max_tokens: int | None  # None: what the context leaves
    sampling: Sampling  # settled but for max_tokens, seed and branch
    seed: int | None  # None: drawn by the router
    answers: int
    stops: tuple[str, ...]
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
    wanted = request.sampling
    temperature = wanted.temperature if wanted.HasField("temperature") else defaults.temperature
    max_tokens = _max_tokens(wanted, model)
    repetition = wanted.repetition_penalty if wanted.HasField("repetition_penalty") else defaults.repetition_penalty
    sampling = Sampling(
        max_tokens=0,
        temperature=_number("temperature", temperature, MAX_TEMPERATURE),
        top_p=_number("top_p", wanted.top_p if wanted.HasField("top_p") else defaults.top_p, 1.0, zero=False),
        top_k=min(wanted.top_k if wanted.HasField("top_k") else defaults.top_k, model.vocab_size),
        min_p=_number("min_p", wanted.min_p if wanted.HasField("min_p") else defaults.min_p, 1.0),
        stop_token_ids=_stop_tokens(wanted, model, defaults),
        logprobs=_count("logprobs", wanted.logprobs, 0, MAX_LOGPROBS) if wanted.HasField("logprobs") else None,
        repetition_penalty=_number("repetition_penalty", repetition, MAX_REPETITION_PENALTY, zero=False),
        presence_penalty=_either_way("presence_penalty", wanted.presence_penalty, MAX_PENALTY),
        frequency_penalty=_either_way("frequency_penalty", wanted.frequency_penalty, MAX_PENALTY),
        logit_bias=_logit_bias(wanted, model),
        min_tokens=_min_tokens(wanted, max_tokens, model),
    )
    resume = request.stream.resume_after_seq
    if request.request_id:
        check_request_id(request.request_id)
    elif resume:
        raise InvalidRequest("stream.resume_after_seq needs the request_id of the request to resume")
    return Draft(
        request_id=RequestId(request.request_id),
        digest=_digest(request),
        prompt=_prompt(request, model),
        max_tokens=max_tokens,
        sampling=sampling,
        seed=wanted.seed if wanted.HasField("seed") else None,
        answers=_count("n", wanted.n, 1, MAX_ANSWERS) if wanted.HasField("n") else 1,
        stops=_stops(wanted.stop),
        resume_after_seq=resume,
        final_only=request.stream.final_only,
    )


def settle(
    drafted: Draft, prompt_tokens: int, seed: int, model: ModelLimits, defaults: GenerationDefaults
) -> list[Sampling]:
    """One `Sampling` per answer, all settled, now that the prompt's length is known. Raises ContextExceeded."""
    if prompt_tokens < 1:
        raise InvalidRequest("the prompt is empty: it must hold at least one token")
    room = model.max_model_len - prompt_tokens
    if room < 1:
        raise ContextExceeded(
            f"the prompt has {prompt_tokens} tokens; with at least one token of answer, "
            f"the context of {model.max_model_len} leaves it {model.max_model_len - 1}"
        )
    max_tokens = drafted.max_tokens
    if max_tokens is None:
        max_tokens = min(room, defaults.max_new_tokens or room)
    elif max_tokens > room:
        raise ContextExceeded(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}; "
            f"together they exceed the context of {model.max_model_len}"
        )
    min_tokens = drafted.sampling.min_tokens
    if min_tokens > room:
        raise ContextExceeded(
            f"the prompt has {prompt_tokens} tokens and min_tokens is {min_tokens}; "
            f"together they exceed the context of {model.max_model_len}"
        )
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens}; without max_tokens this model's answers have {max_tokens}")
    return [replace(drafted.sampling, max_tokens=max_tokens, seed=seed, branch=n) for n in range(drafted.answers)]


def check_model(name: str, served: str) -> None:
    """Empty means the served model. Raises UnknownModel."""
    if name and name != served:
        raise UnknownModel(f"no model of that name is served here; the served model is {served!r}")


def check_request_id(request_id: str) -> RequestId:
    """Raises InvalidRequest."""
    if not _REQUEST_ID.match(request_id):
        raise InvalidRequest(f"request_id must be 1 to {MAX_REQUEST_ID} printable ASCII characters")
    return RequestId(request_id)


def check_token_ids(field: str, ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Raises InvalidRequest, naming the first id that the vocabulary does not have."""
    if ids and max(ids) >= vocab_size:
        at, bad = next((at, token) for at, token in enumerate(ids) if token >= vocab_size)
        raise InvalidRequest(f"{field}[{at}] is {bad}; the vocabulary ends at {vocab_size - 1}")
    return tuple(ids)


def check_chat(chat: pb.Chat) -> tuple[ChatMessage, ...]:
    """Raises InvalidRequest."""
    _count("the number of chat.messages", len(chat.messages), 1, MAX_CHAT_MESSAGES)
    for at, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"chat.messages[{at}].role must be one of {', '.join(ROLES)}")
    return tuple(ChatMessage(role=message.role, content=message.content) for message in chat.messages)


def _prompt(request: pb.GenerateRequest, model: ModelLimits) -> Prompt:
    match request.WhichOneof("input"):
        case "text":
            return Prompt(text=request.text)
        case "chat":
            return Prompt(messages=check_chat(request.chat))
        case "token_ids":
            ids = request.token_ids.ids
            if not ids:
                raise InvalidRequest("token_ids must hold at least one token")
            if len(ids) >= model.max_model_len:
                raise ContextExceeded(
                    f"token_ids holds {len(ids)} tokens; the context of {model.max_model_len} leaves a prompt "
                    f"{model.max_model_len - 1}"
                )
            return Prompt(token_ids=check_token_ids("token_ids", ids, model.vocab_size))
        case _:
            raise InvalidRequest("an input is missing: give one of text, token_ids or chat")


def _max_tokens(wanted: pb.SamplingParams, model: ModelLimits) -> int | None:
    if not wanted.HasField("max_tokens"):
        return None
    if wanted.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1")
    if wanted.max_tokens >= model.max_model_len:
        raise ContextExceeded(
            f"max_tokens is {wanted.max_tokens}; "
            f"the context of {model.max_model_len} leaves at most {model.max_model_len - 1}"
        )
    return wanted.max_tokens


def _min_tokens(wanted: pb.SamplingParams, max_tokens: int | None, model: ModelLimits) -> int:
    if max_tokens is not None:
        return _count("min_tokens, beside this max_tokens,", wanted.min_tokens, 0, max_tokens)
    if wanted.min_tokens >= model.max_model_len:
        raise ContextExceeded(
            f"min_tokens is {wanted.min_tokens}; "
            f"the context of {model.max_model_len} leaves at most {model.max_model_len - 1}"
        )
    return wanted.min_tokens


def _logit_bias(wanted: pb.SamplingParams, model: ModelLimits) -> tuple[tuple[int, float], ...]:
    """Rising by token; without those that change nothing."""
    _count("the number of logit_bias entries", len(wanted.logit_bias), 0, MAX_LOGIT_BIASES)
    biases = sorted(wanted.logit_bias.items())
    for token, bias in biases:
        if token >= model.vocab_size:
            raise InvalidRequest(f"logit_bias holds token {token}; the vocabulary ends at {model.vocab_size - 1}")
        _either_way(f"the logit_bias of token {token}", bias, MAX_LOGIT_BIAS)
    return tuple((token, bias) for token, bias in biases if bias != 0)


def _stop_tokens(wanted: pb.SamplingParams, model: ModelLimits, defaults: GenerationDefaults) -> frozenset[int]:
    _count("the number of stop_token_ids", len(wanted.stop_token_ids), 0, MAX_STOP_TOKENS)
    stops = frozenset(check_token_ids("stop_token_ids", wanted.stop_token_ids, model.vocab_size))
    if wanted.ignore_eos:
        return stops
    return stops | {token for token in defaults.eos_token_ids if token < model.vocab_size}  # others never come


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    _count("the number of stop strings", len(stops), 0, MAX_STOPS)
    for at, stop in enumerate(stops):
        _count(f"the length of stop[{at}], in bytes of UTF-8,", len(stop.encode()), 1, MAX_STOP_BYTES)
    return tuple(stops)


def _number(name: str, value: float, high: float, *, zero: bool = True) -> float:
    """`zero`: 0 itself is allowed. NaN fails every comparison, so it is refused."""
    if not 0.0 <= value <= high or (value == 0.0 and not zero):
        low = "from 0 to" if zero else "above 0 and at most"
        raise InvalidRequest(f"{name} must be {low} {high:g}")
    return value


def _either_way(name: str, value: float, most: float) -> float:
    if not -most <= value <= most:  # NaN too
        raise InvalidRequest(f"{name} must be from {-most:g} to {most:g}")
    return value


def _count(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be from {low} to {high}, not {value}")
    return value


def _digest(request: pb.GenerateRequest) -> bytes:
    """Of the request without its name and without how it is streamed."""
    body = pb.GenerateRequest()
    body.CopyFrom(request)
    body.ClearField("request_id")
    body.ClearField("stream")
    return blake2b(body.SerializeToString(deterministic=True), digest_size=16).digest()
