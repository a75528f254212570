"""From what a client wants to what an engine is told: parameters checked, defaults settled. Pure: no clock, no I/O.

The router and the in-process `LLM` share it, so the same call means the same in both. Every field has a least and a
greatest value, and a refusal names the field and both; it never repeats a client's text.

The context. `max_model_len` tokens hold prompt and answer together, and nothing is ever cut off silently:
- a prompt that leaves no room for one token is refused (OUT_OF_RANGE);
- a given `max_tokens` that does not fit beside the prompt is refused (OUT_OF_RANGE), as OpenAI's and vLLM's APIs do;
- an absent `max_tokens` takes the model's `max_new_tokens`, if its generation_config.json names one, cut down to what
  the prompt leaves; else all that it leaves.
"""

import math
import operator
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass, replace

from ..core.errors import ContextExceeded, InvalidRequest
from ..core.request import MAX_LOGPROBS, MAX_PROMPT_LOGPROBS, Sampling
from ..core.sampling_params import SamplingParams
from .chat_template import ChatMessage, Message
from .generation_config import GenerationDefaults

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
_U32 = 2**32 - 1
_U64 = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the served model allows."""

    name: str
    max_model_len: int  # tokens of prompt and answer together
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDraft:
    """Valid parameters, settled but for what depends on the prompt, and for the seed."""

    max_tokens: int | None  # None: what the context leaves
    sampling: Sampling  # settled but for max_tokens, seed and branch
    seed: int | None  # None: drawn by whoever runs it
    answers: int
    stops: tuple[str, ...]


def draft_sampling(wanted: SamplingParams, model: ModelLimits, defaults: GenerationDefaults) -> SamplingDraft:
    """Checks all that can be checked without the prompt. Raises InvalidRequest, or ContextExceeded for a number of
    tokens that can't fit."""
    max_tokens = _max_tokens(wanted.max_tokens, model)
    repetition = _given(wanted.repetition_penalty, defaults.repetition_penalty)
    top_k = defaults.top_k if wanted.top_k is None else wanted.top_k
    sampling = Sampling(
        max_tokens=0,
        temperature=_number("temperature", _given(wanted.temperature, defaults.temperature), MAX_TEMPERATURE),
        top_p=_number("top_p", _given(wanted.top_p, defaults.top_p), 1.0, zero=False),
        top_k=min(check_count("top_k", top_k, 0, _U32), model.vocab_size),
        min_p=_number("min_p", _given(wanted.min_p, defaults.min_p), 1.0),
        stop_token_ids=_stop_tokens(wanted, model, defaults),
        logprobs=_optional_count("logprobs", wanted.logprobs, 0, MAX_LOGPROBS),
        repetition_penalty=_number("repetition_penalty", repetition, MAX_REPETITION_PENALTY, zero=False),
        presence_penalty=_either_way("presence_penalty", wanted.presence_penalty or 0.0, MAX_PENALTY),
        frequency_penalty=_either_way("frequency_penalty", wanted.frequency_penalty or 0.0, MAX_PENALTY),
        logit_bias=_logit_bias(wanted, model),
        min_tokens=_min_tokens(wanted.min_tokens or 0, max_tokens, model),
        prompt_logprobs=_optional_count("prompt_logprobs", wanted.prompt_logprobs, 0, MAX_LOGPROBS),
    )
    return SamplingDraft(
        max_tokens=max_tokens,
        sampling=sampling,
        seed=_optional_count("seed", wanted.seed, 0, _U64),
        answers=_optional_count("n", wanted.n, 1, MAX_ANSWERS) or 1,
        stops=_stops(wanted.stops),
    )


def settle(
    drafted: SamplingDraft, prompt_tokens: int, seed: int, model: ModelLimits, defaults: GenerationDefaults
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
    if drafted.sampling.prompt_logprobs is not None:
        asked = drafted.answers * prompt_tokens * (1 + drafted.sampling.prompt_logprobs)
        check_count("n times prompt tokens times (1 + prompt_logprobs)", asked, 0, MAX_PROMPT_LOGPROBS)
    return [replace(drafted.sampling, max_tokens=max_tokens, seed=seed, branch=n) for n in range(drafted.answers)]


def check_prompt_ids(ids: Sequence[int], model: ModelLimits) -> tuple[int, ...]:
    """A prompt given as tokens. Raises InvalidRequest, ContextExceeded."""
    if not ids:
        raise InvalidRequest("token_ids must hold at least one token")
    if len(ids) >= model.max_model_len:
        raise ContextExceeded(
            f"token_ids holds {len(ids)} tokens; the context of {model.max_model_len} leaves a prompt "
            f"{model.max_model_len - 1}"
        )
    return check_token_ids("token_ids", ids, model.vocab_size)


def check_token_ids(field: str, ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Raises InvalidRequest, naming the first id that the vocabulary does not have."""
    try:
        whole = tuple(map(operator.index, ids))
    except TypeError:
        raise InvalidRequest(f"{field} must hold whole numbers alone") from None
    if whole and (max(whole) >= vocab_size or min(whole) < 0):
        at, bad = next((at, token) for at, token in enumerate(whole) if not 0 <= token < vocab_size)
        raise InvalidRequest(f"{field}[{at}] is {bad}; the vocabulary goes from 0 to {vocab_size - 1}")
    return whole


def check_chat(messages: Sequence[Message]) -> tuple[ChatMessage, ...]:
    """Raises InvalidRequest."""
    check_count("the number of chat.messages", len(messages), 1, MAX_CHAT_MESSAGES)
    for at, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"chat.messages[{at}].role must be one of {', '.join(ROLES)}")
    return tuple(ChatMessage(role=message.role, content=message.content) for message in messages)


def _given(value: float | None, default: float) -> float:
    return default if value is None else _float32(value)


def _float32(value: float) -> float:
    """As the wire carries it, so that a seed draws the same tokens by either way. NaN, which is refused, for what is no
    number."""
    try:
        return c_float(value).value
    except (TypeError, OverflowError):
        return math.nan


def _max_tokens(value: int | None, model: ModelLimits) -> int | None:
    if value is None:
        return None
    if _whole("max_tokens", value) < 1:
        raise InvalidRequest("max_tokens must be at least 1")
    if value >= model.max_model_len:
        raise ContextExceeded(
            f"max_tokens is {value}; the context of {model.max_model_len} leaves at most {model.max_model_len - 1}"
        )
    return value


def _min_tokens(value: int, max_tokens: int | None, model: ModelLimits) -> int:
    if max_tokens is not None:
        return check_count("min_tokens, beside this max_tokens,", value, 0, max_tokens)
    if check_count("min_tokens", value, 0, _U32) >= model.max_model_len:
        raise ContextExceeded(
            f"min_tokens is {value}; the context of {model.max_model_len} leaves at most {model.max_model_len - 1}"
        )
    return value


def _logit_bias(wanted: SamplingParams, model: ModelLimits) -> tuple[tuple[int, float], ...]:
    """Rising by token; without those that change nothing."""
    given = wanted.logit_bias or {}
    check_count("the number of logit_bias entries", len(given), 0, MAX_LOGIT_BIASES)
    biases = {}
    for key, bias in given.items():
        token = _whole("a token of logit_bias", key)
        if not 0 <= token < model.vocab_size:
            raise InvalidRequest(
                f"logit_bias holds token {token}; the vocabulary goes from 0 to {model.vocab_size - 1}"
            )
        biases[token] = _either_way(f"the logit_bias of token {token}", bias, MAX_LOGIT_BIAS)
    return tuple((token, bias) for token, bias in sorted(biases.items()) if bias != 0)


def _stop_tokens(wanted: SamplingParams, model: ModelLimits, defaults: GenerationDefaults) -> frozenset[int]:
    check_count("the number of stop_token_ids", len(wanted.stop_token_ids), 0, MAX_STOP_TOKENS)
    stops = frozenset(check_token_ids("stop_token_ids", wanted.stop_token_ids, model.vocab_size))
    if wanted.ignore_eos:
        return stops
    return stops | {token for token in defaults.eos_token_ids if token < model.vocab_size}  # others never come


def _stops(stops: tuple[str, ...]) -> tuple[str, ...]:
    check_count("the number of stop strings", len(stops), 0, MAX_STOPS)
    for at, stop in enumerate(stops):
        try:
            num_bytes = len(stop.encode())
        except (AttributeError, UnicodeEncodeError):
            raise InvalidRequest(f"stop[{at}] is no text, or not valid Unicode") from None
        check_count(f"the length of stop[{at}], in bytes of UTF-8,", num_bytes, 1, MAX_STOP_BYTES)
    return stops


def _number(name: str, value: float, high: float, *, zero: bool = True) -> float:
    """`zero`: 0 itself is allowed. NaN fails every comparison, so it is refused."""
    if not 0.0 <= value <= high or (value == 0.0 and not zero):
        low = "from 0 to" if zero else "above 0 and at most"
        raise InvalidRequest(f"{name} must be {low} {high:g}")
    return value


def _either_way(name: str, value: float, most: float) -> float:
    number = _float32(value)
    if not -most <= number <= most:  # NaN too
        raise InvalidRequest(f"{name} must be from {-most:g} to {most:g}")
    return number


def _optional_count(name: str, value: int | None, low: int, high: int) -> int | None:
    return None if value is None else check_count(name, value, low, high)


def check_count(name: str, value: int, low: int, high: int) -> int:
    """Raises InvalidRequest, naming both bounds."""
    if not low <= (count := _whole(name, value)) <= high:
        raise InvalidRequest(f"{name} must be from {low} to {high}, not {count}")
    return count


def _whole(name: str, value: int) -> int:
    """Annotations do not keep an in-process caller from giving something else."""
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidRequest(f"{name} must be a whole number") from None
