"""What `LLM` is asked, brought into one form, and what either way of running it has to be able to do."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ..core.errors import BatonError, InvalidRequest
from ..core.request import Sampling
from ..core.sampling_params import SamplingParams
from ..text.generation_config import GenerationDefaults
from ..text.settling import ModelLimits
from .progress import ProgressLine
from .results import ChatMessage, Prompt, Result

AnyMessage = ChatMessage | Mapping[str, str]
AnyPrompt = str | Sequence[int] | Sequence[AnyMessage]
"""Text, token ids, or a conversation, whose messages may also be `{"role": ..., "content": ...}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt, ready to run."""

    index: int  # in the list that was asked
    prompt: Prompt
    token_ids: tuple[int, ...]
    params: SamplingParams  # with its seed
    samplings: tuple[Sampling, ...]  # the same settled, one per answer
    stops: tuple[str, ...]


class Backend(Protocol):
    """Runs jobs. Errors name the prompt: `prompts[3]: ...`."""

    @property
    def limits(self) -> ModelLimits: ...

    @property
    def defaults(self) -> GenerationDefaults:
        """Of the model, as far as they are known here."""

    def tokenise(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]: ...

    def run(self, jobs: Sequence[Job], progress: ProgressLine) -> list[Result]:
        """In the order of `jobs`. When one fails all end, and its error is raised; the next run may come then."""

    def close(self) -> None: ...


@contextmanager
def about(index: int) -> Iterator[None]:
    """Errors say which prompt they are about."""
    try:
        yield
    except BatonError as error:
        raise type(error)(f"prompts[{index}]: {error}") from error


def list_of(prompts: AnyPrompt | Sequence[AnyPrompt]) -> list[Prompt]:
    """One prompt, or a list of them. Raises InvalidRequest."""
    if isinstance(prompts, str) or (prompts and _is_part(prompts[0])):
        many: Sequence[object] = [prompts]
    else:
        many = prompts
    found = []
    for index, prompt in enumerate(many):
        with about(index):
            found.append(_prompt(prompt))
    return found


def is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], ChatMessage)


def spread(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One for each prompt. Raises InvalidRequest unless there is one, or as many as prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest(f"there are {count} prompts and {len(params)} sampling_params: give one, or as many")
    return list(params)


def _is_part(item: object) -> bool:
    """Of one prompt, and not a prompt of its own."""
    return isinstance(item, ChatMessage | Mapping) or hasattr(item, "__index__")


def _prompt(prompt: object) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or not prompt:
        raise InvalidRequest("a prompt is text, a list of token ids, or a list of chat messages, and not empty")
    if isinstance(prompt[0], ChatMessage | Mapping):
        return tuple(map(_message, prompt))
    try:
        return tuple(map(operator.index, prompt))
    except TypeError:
        raise InvalidRequest("a prompt is text, chat messages, or token ids, which are whole numbers") from None


def _message(message: object) -> ChatMessage:
    if isinstance(message, Mapping) and message.keys() == {"role", "content"}:
        message = ChatMessage(message["role"], message["content"])
    if not isinstance(message, ChatMessage) or not isinstance(message.content, str):
        raise InvalidRequest("a chat message has a role and a content, both text, and nothing else")
    return message
