"""What a worker is asked to do and what it answers, token by token."""

from dataclasses import dataclass, field
from enum import StrEnum

from .ids import SequenceId

MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 2**17
"""Most log probabilities of one prompt, and of a request's prompts together: about 1.5 MB on the wire, which fits every
frame and message."""
MAX_PRIORITY = 100  # either way


class FinishReason(StrEnum):
    """Why an answer ended, as its reader sees it."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose the tokens of one answer, every default settled."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    seed: int = 0  # 64 bits
    branch: int = 0  # which of the n answers
    stop_token_ids: frozenset[int] = frozenset()  # ends of sequence among them, unless ignored
    logprobs: int | None = None  # None: none; k: the chosen token's and the k best
    repetition_penalty: float = 1.0  # of tokens in prompt or answer: divides logits above 0, multiplies others
    presence_penalty: float = 0.0  # taken from the logits of tokens in the answer
    frequency_penalty: float = 0.0  # taken once for each time that the token is in the answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), each token once, rising
    min_tokens: int = 0  # before so many no stop token is chosen
    prompt_logprobs: int | None = None  # None: none; k: of each prompt token but the first, its own and the k best


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence as a worker takes it."""

    sequence_id: SequenceId
    prompt: tuple[int, ...]
    sampling: Sampling
    timeout_s: float | None = None  # what is left of the deadline when the worker reads it
    traceparent: str = ""  # W3C trace context
    salt: str = ""  # of the tenant, part of every block key
    priority: int = 0  # larger goes first, as far as the worker's policy looks at it
    tenant: str = ""  # whose account the work goes to, where tenants share fairly
    number: int = 0  # names it in StepTokens, as no other sequence that lives on its link; 0: none, all goes by its id

    def deadline(self, now: float) -> float | None:
        """On the clock that says `now`, in seconds; None: it has none."""
        return None if self.timeout_s is None else now + self.timeout_s


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    logprob: float  # natural log, before penalties, bias, temperature and filters
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprob:
    """One token of a prompt as its reader sees it."""

    token_id: int
    logprob: float | None  # natural log; None for the first token, which nothing comes before
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTokens:
    """New tokens of one sequence; position 0 is the first token of the answer."""

    sequence_id: SequenceId
    first_position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0  # with token 0: prompt tokens that prefill did not compute
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # with token 0: one per prompt token, None for the first


class EndReason(StrEnum):
    """Why a sequence left a worker."""

    STOP = "stop"
    LENGTH = "length"
    RELEASED = "released"
    HANDED_OVER = "handed_over"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    sequence_id: SequenceId
    reason: EndReason
    error_code: str = ""  # name of a class in errors.py, with FAILED
    error_message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a worker is, told on its frames."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0  # free or evictable
    total_blocks: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedPart:
    """One part of a request's life on a worker, for its trace. Times are Unix nanoseconds."""

    sequence_id: SequenceId
    name: str  # a span name of observe/names.py
    traceparent: str
    start_ns: int
    end_ns: int
    attributes: tuple[tuple[str, str | int | float | bool], ...] = field(default=())
