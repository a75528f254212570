"""OpenAI's request bodies to ours. Pure.

Fields that OpenAI knows and that change nothing here (`user`, `metadata`, `store` ...), and all that nobody knows, are
ignored, as clients send many. Fields that would change the answer and are not supported are refused by name, unless
they hold the value that asks for nothing. Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`,
`ignore_eos`, `stop_token_ids`, `priority` (larger goes first, other than in vLLM); of a completion `prompt_logprobs`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from ..core.errors import InvalidRequest
from ..v1 import inference_pb2 as pb

T = TypeVar("T")
Body: TypeAlias = Mapping[str, object]
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions. A chat without a limit takes what the context leaves."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "length_penalty": (1,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": ([],),
    "prompt_embeds": (),
}
"""Fields that are refused, and the values of them that ask for nothing. null always asks for nothing."""

_TOKEN_ID = re.compile(r"(0|[1-9][0-9]{0,9})\Z")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_U32 = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAiRequest:
    request: pb.GenerateRequest
    chat: bool
    stream: bool
    include_usage: bool  # of a stream: a last chunk with the usage


def parse(body: object, *, chat: bool, request_id: str) -> OpenAiRequest:
    """A body of POST /v1/chat/completions or /v1/completions. Raises InvalidRequest, which names the field."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    for name, neutral in _NEUTRAL.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise InvalidRequest(f"{name} is not supported here")
    best_of = _integer(body, "best_of", 0, _U32)
    if best_of is not None and best_of > (_integer(body, "n", 0, _U32) or 1):
        raise InvalidRequest("best_of is not supported here")
    if chat and body.get("prompt_logprobs") is not None:
        raise InvalidRequest("prompt_logprobs is not supported for a chat: use /v1/completions")
    request = pb.GenerateRequest(request_id=request_id, model=_take(body, "model", _text) or "")
    request.priority = _integer(body, "priority", -(2**31), 2**31 - 1) or 0
    if chat:
        request.chat.CopyFrom(_chat(body.get("messages")))
    else:
        _fill_prompt(request, body.get("prompt"))
    _fill_sampling(request.sampling, body, chat)
    stream = _take(body, "stream", _flag) or False
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise InvalidRequest("stream_options must be an object")
    if options and not stream:
        raise InvalidRequest("stream_options needs stream to be true")
    request.stream.final_only = not stream
    include_usage = bool(options and _take(options, "include_usage", _flag))
    return OpenAiRequest(request=request, chat=chat, stream=stream, include_usage=include_usage)


def _fill_sampling(sampling: pb.SamplingParams, body: Body, chat: bool) -> None:
    for name in _FLOATS:
        number = _take(body, name, _number)
        if number is not None:
            setattr(sampling, name, number)
    for name in ("top_k", "n", "min_tokens"):
        count = _integer(body, name, -1 if name == "top_k" else 0, _U32)
        if count is not None:
            setattr(sampling, name, max(0, count))  # top_k -1 is vLLM's way to say all tokens
    limit = _integer(body, "max_completion_tokens", 0, _U32)
    limit = _integer(body, "max_tokens", 0, _U32) if limit is None else limit
    if limit is not None or not chat:
        sampling.max_tokens = DEFAULT_COMPLETION_TOKENS if limit is None else limit
    seed = _integer(body, "seed", -(2**63), 2**64 - 1)
    if seed is not None:
        sampling.seed = seed % 2**64
    if _take(body, "ignore_eos", _flag):
        sampling.ignore_eos = True
    stop = body.get("stop")
    if stop is not None:
        sampling.stop.extend([_text("stop", stop)] if isinstance(stop, str) else _list("stop", stop, _text))
    if body.get("stop_token_ids") is not None:
        sampling.stop_token_ids.extend(_list("stop_token_ids", body["stop_token_ids"], _token))
    for token, bias in (_take(body, "logit_bias", _biases) or {}).items():
        sampling.logit_bias[token] = bias
    logprobs = _chat_logprobs(body) if chat else _integer(body, "logprobs", 0, _U32)
    if logprobs is not None:
        sampling.logprobs = logprobs
    prompt_logprobs = _integer(body, "prompt_logprobs", 0, _U32)
    if prompt_logprobs is not None:
        sampling.prompt_logprobs = prompt_logprobs


def _chat_logprobs(body: Body) -> int | None:
    wanted = _take(body, "logprobs", _flag)
    top = _integer(body, "top_logprobs", 0, _U32)
    if top and not wanted:
        raise InvalidRequest("top_logprobs needs logprobs to be true")
    return (top or 0) if wanted else None


def _chat(messages: object) -> pb.Chat:
    if not isinstance(messages, list):
        raise InvalidRequest("messages must be a list")
    return pb.Chat(messages=[_message(f"messages[{at}]", message) for at, message in enumerate(messages)])


def _message(name: str, message: object) -> pb.ChatMessage:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{name} must be an object")
    for unsupported in ("tool_calls", "tool_call_id", "function_call", "audio"):
        if message.get(unsupported):
            raise InvalidRequest(f"{name}.{unsupported} is not supported here")
    role = _text(f"{name}.role", message.get("role"))
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(f"{name}.content[{at}]", part) for at, part in enumerate(content))
    # "developer" is what newer OpenAI models call the system's messages.
    return pb.ChatMessage(role="system" if role == "developer" else role, content=_text(f"{name}.content", content))


def _part(name: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise InvalidRequest(f"{name} must be of type text: nothing else is supported here")
    return _text(f"{name}.text", part.get("text"))


def _fill_prompt(request: pb.GenerateRequest, prompt: object) -> None:
    """OpenAI takes a text, token ids, or a list of either; here the list holds one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise InvalidRequest("prompt holds several prompts: send one request for each")
        prompt = prompt[0]
    if isinstance(prompt, str):
        request.text = _text("prompt", prompt)
    elif isinstance(prompt, list):
        request.token_ids.ids.extend(_list("prompt", prompt, _token))
        request.token_ids.SetInParent()
    else:
        raise InvalidRequest("prompt must be a text or a list of token ids")


def _take(body: Body, name: str, read: Callable[[str, object], T]) -> T | None:
    value = body.get(name)
    return None if value is None else read(name, value)


def _integer(body: Body, name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON has one kind of number
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be a whole number from {low} to {high}")
    return value


def _token(name: str, value: object) -> int:
    token = _integer({name: value}, name, 0, _U32)
    if token is None:
        raise InvalidRequest(f"{name} must hold no null")
    return token


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise InvalidRequest(f"{name} must be a number")
    return float(value)


def _biases(name: str, value: object) -> dict[int, float]:
    """JSON's keys are texts: {"50256": -100}."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object of token ids and numbers")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not _TOKEN_ID.match(key) or int(key) > _U32:
            raise InvalidRequest(f"{name} must have token ids as its keys")
        biases[int(key)] = _number(f"{name}.{key}", bias)
    return biases


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} is not valid Unicode: it holds a lone surrogate") from None
    return value


def _list(name: str, value: object, read: Callable[[str, object], T]) -> list[T]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} must be a list")
    return [read(f"{name}[{at}]", item) for at, item in enumerate(value)]
