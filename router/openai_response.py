"""Our messages to OpenAI's response bodies, whole and streamed. Knows no HTTP."""

import time
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..core import errors
from ..core.request import PromptLogprob, TokenLogprobs
from ..text.tokenizer import Tokenizer
from .records import Delta, Message, Usage

Json: TypeAlias = dict[str, Any]
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have; vLLM's choice too

STATUS: dict[type[errors.BatonError], tuple[int, str, str | None]] = {
    errors.InvalidRequest: (400, "invalid_request_error", None),
    errors.ContextExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    errors.NotAuthenticated: (401, "invalid_request_error", "invalid_api_key"),
    errors.UnknownModel: (404, "invalid_request_error", "model_not_found"),
    errors.UnknownRequest: (404, "invalid_request_error", None),
    errors.RequestConflict: (409, "invalid_request_error", None),
    errors.Overloaded: (429, "rate_limit_error", "overloaded"),
    errors.Cancelled: (499, "server_error", "cancelled"),
    errors.DeadlineExceeded: (504, "server_error", "timeout"),
}
"""HTTP status, type and code of each error. All others that are named in core/errors.py are 503; the rest are bugs."""


def error_body(error: BaseException) -> tuple[int, Json]:
    """HTTP status and OpenAI's error object. Of what is no BatonError nothing is told."""
    if isinstance(error, errors.BatonError):
        status, kind, code = STATUS.get(type(error), (503, "server_error", None))
        message = str(error)
    else:
        status, kind, code, message = 500, "server_error", None, "an internal error; the server's log has the details"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": code}}


def model_body(name: str, max_model_len: int) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "baton", "max_model_len": max_model_len}


@dataclass(slots=True, kw_only=True)
class Shaper:
    """The bodies of one request's answer."""

    request_id: str
    model: str
    chat: bool
    logprobs: bool
    prompt_logprobs: bool
    include_usage: bool
    tokenizer: Tokenizer
    created: int = field(default_factory=lambda: int(time.time()))
    _begun: set[int] = field(default_factory=set)  # answers whose role was told
    _offsets: dict[int, int] = field(default_factory=dict)  # characters of each answer so far

    def whole(self, message: Message) -> Json:
        """The body of an answer that is not streamed."""
        assert message.usage is not None
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(delta, whole=True) for delta in message.outputs]
        return self._body(kind, choices) | {"usage": usage_body(message.usage)}

    def chunks(self, message: Message) -> list[Json]:
        """The bodies of a stream's events."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        found = []
        if self.chat:
            new = [delta.index for delta in message.outputs if delta.index not in self._begun]
            self._begun.update(new)
            found = [
                self._body(kind, [_chat_choice(index, {"delta": {"role": "assistant", "content": ""}}, None)])
                for index in new
            ]
        found += [self._body(kind, [self._choice(delta, whole=False)]) for delta in message.outputs]
        if self.include_usage:
            found = [chunk | {"usage": None} for chunk in found]
            if message.usage is not None:
                found.append(self._body(kind, []) | {"usage": usage_body(message.usage)})
        return found

    def _body(self, kind: str, choices: list[Json]) -> Json:
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        return {
            "id": prefix + self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, delta: Delta, *, whole: bool) -> Json:
        finish = delta.finish and str(delta.finish)
        if not self.chat:
            logprobs = self._completion_logprobs(delta) if self.logprobs else None
            choice = {"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": finish}
            if not self.prompt_logprobs:
                return choice
            of_prompt = [self._prompt_logprob(entry) for entry in delta.prompt_logprobs]
            return choice | {"prompt_logprobs": of_prompt or None}
        if whole:
            content: Json = {"message": {"role": "assistant", "content": delta.text, "refusal": None}}
        else:
            content = {"delta": {"content": delta.text}}
        return _chat_choice(delta.index, content, finish, self._chat_logprobs(delta) if self.logprobs else None)

    def _chat_logprobs(self, delta: Delta) -> Json:
        return {
            "content": [
                self._token(token, entry.logprob)
                | {"top_logprobs": [self._token(other, logprob) for other, logprob in entry.top]}
                for token, entry in zip(delta.token_ids, delta.logprobs, strict=False)
            ]
        }

    def _completion_logprobs(self, delta: Delta) -> Json:
        tokens = [self._text(token) for token in delta.token_ids]
        offsets = []
        at = self._offsets.get(delta.index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[delta.index] = at
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.logprob) for entry in delta.logprobs],
            "top_logprobs": [self._top(entry) for entry in delta.logprobs],
            "text_offset": offsets,
        }

    def _prompt_logprob(self, entry: PromptLogprob) -> Json | None:
        """As vLLM gives it: null for the first token; for each other its own id and those of the best, each with its
        place among the best. A token of the prompt that is not among them has rank null, as nobody counted."""
        if entry.logprob is None:
            return None
        ranks = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
        return {
            str(token): {
                "logprob": _finite(logprob),
                "rank": ranks.get(token),
                "decoded_token": self._text(token),
            }
            for token, logprob in {entry.token_id: entry.logprob, **dict(entry.top)}.items()
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        return {self._text(token): _finite(logprob) for token, logprob in reversed(entry.top)}

    def _token(self, token: int, logprob: float) -> Json:
        text = self._text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(self.tokenizer.bytes_of(token))}

    def _text(self, token: int) -> str:
        return self.tokenizer.decode((token,), skip_special=False)


def usage_body(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _chat_choice(index: int, content: Json, finish: str | None, logprobs: Json | None = None) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
