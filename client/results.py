"""What the client takes and gives, free of protobuf."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.request import FinishReason, PromptLogprob, TokenLogprobs
from ..core.sampling_params import SamplingParams

__all__ = [
    "Answer",
    "ChatMessage",
    "Completion",
    "Explanation",
    "FinishReason",
    "Generation",
    "Message",
    "ModelInfo",
    "Output",
    "Prompt",
    "PromptLogprob",
    "Result",
    "Sampling",
    "SamplingParams",
    "TokenLogprobs",
    "Usage",
    "Worker",
]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str  # "system", "user" or "assistant", as far as the model's template knows them
    content: str


Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids used as they are, or a conversation rendered by the model's chat template."""


Sampling = SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int  # over all answers
    cached_tokens: int  # prompt tokens whose KV was there already


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is new of one answer."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()  # on the answer's first message, when asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a stream."""

    request_id: str
    seq: int  # tokens of the request sent so far, over all answers
    outputs: tuple[Output, ...]
    usage: Usage | None = None  # on the last message

    @property
    def text(self) -> str:
        """New text of the first answer."""
        return "".join(output.text for output in self.outputs if output.index == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()  # one per token of the prompt, when asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer, or n of them."""

    request_id: str
    answers: tuple[Answer, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.answers[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One of the n answers of a `Result`."""

    index: int
    text: str
    token_ids: tuple[int, ...]  # a stop token, or the tokens of a stop string, among them
    finish_reason: FinishReason
    stop_reason: str | int | None = None  # the stop string or stop token that ended it; None also: a cluster didn't say
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token, when asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What `LLM` has for one prompt."""

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]  # one per token, when asked for; None for the first token
    outputs: tuple[Completion, ...]  # n of them
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.outputs[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    name: str
    max_model_len: int  # tokens of prompt and answer together
    vocab_size: int
    dtype: str
    fingerprint: str
    ready: bool  # its workers are there


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One worker that is linked to the router, as its last frame told."""

    worker_id: str
    role: str  # "prefill", "decode" or "both"
    draining: bool
    running: int  # sequences in the batch
    waiting: int
    free_blocks: int  # KV blocks free or evictable
    total_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What the router knows of a request. Times are milliseconds from its arrival."""

    request_id: str
    state: str
    trace_id: str
    seed: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    prefill_worker: str
    decode_worker: str
    queued_ms: float
    first_token_ms: float
    total_ms: float
    placement: str


class Collector:
    """Puts the messages of a stream together. A stream without a last message is the caller's to treat as broken."""

    def __init__(self) -> None:
        self._outputs: dict[int, list[Output]] = {}
        self._request_id = ""
        self.usage: Usage | None = None

    def add(self, message: Message) -> None:
        self._request_id = message.request_id
        self.usage = message.usage or self.usage
        for output in message.outputs:
            self._outputs.setdefault(output.index, []).append(output)

    def result(self) -> Generation:
        answers = tuple(_join(self._outputs[index]) for index in sorted(self._outputs))
        usage = self.usage or Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0)
        return Generation(request_id=self._request_id, answers=answers, usage=usage)


def _join(parts: list[Output]) -> Answer:
    return Answer(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=next((part.finish_reason for part in reversed(parts) if part.finish_reason), None),
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs), ()),
    )
