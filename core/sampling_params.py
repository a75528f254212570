"""How a client asks for an answer's tokens to be chosen. What it leaves open, text/settling.py settles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. None takes the default of the model, else of the server."""

    max_tokens: int | None = None
    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None  # None: the client draws one, so that a repeated request gives the same tokens
    n: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None  # k: the chosen token's and the k best
    repetition_penalty: float | None = None  # of tokens in prompt or answer; above 1: rarer
    presence_penalty: float | None = None  # of tokens in the answer; above 0: rarer
    frequency_penalty: float | None = None  # the same, for each time that the token is there
    logit_bias: Mapping[int, float] | None = None  # token id -> what is added to its logit
    min_tokens: int | None = None  # before so many no stop token; a stop string ends the answer all the same
    prompt_logprobs: int | None = None  # k: of each prompt token but the first, its own and the k best

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, also where `stop` is only one."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


_COLLECTIONS = {"stop", "stop_token_ids", "logit_bias"}
SCALARS = tuple(one.name for one in fields(SamplingParams) if one.name not in _COLLECTIONS)
"""Fields that are None or one value; in a request of the gRPC API they have the same names."""
