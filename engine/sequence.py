"""The state of one generation on one engine."""

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from ..core.ids import BlockId, BlockKey, SequenceId
from ..core.request import EndReason, Request, Sampling, TokenLogprobs


class Sequence:
    """Prompt, answer so far, and the blocks that hold their KV.

    [0, computed) KV is in `blocks` | [computed, length) tokens known, KV still to do, or under way
    """

    __slots__ = (
        "apart",
        "blocks",
        "cached_tokens",
        "charged",
        "computed",
        "keys",
        "priority",
        "prompt",
        "prompt_logprobs",
        "salt",
        "sampling",
        "sequence_id",
        "started",
        "tag",
        "tenant",
        "tokens",
    )

    def __init__(
        self,
        sequence_id: SequenceId,
        prompt: tuple[int, ...],
        sampling: Sampling,
        salt: str = "",
        *,
        priority: int = 0,
        tenant: str = "",
        tag: int = 0,
    ) -> None:
        """tag: the caller's, given back with each token. Raises ValueError for an empty prompt."""
        if not prompt:
            raise ValueError("a prompt has at least one token")
        self.sequence_id = sequence_id
        self.prompt = prompt
        self.sampling = sampling
        self.salt = salt
        self.priority = priority
        self.tenant = tenant
        self.tag = tag
        self.tokens: list[int] = []  # of the answer
        self.blocks: list[BlockId] = []  # held for this sequence, in order
        self.computed = 0
        self.keys: list[BlockKey] = []  # of its full blocks that the prefix cache knows by now
        self.apart = False  # its KV is rounded otherwise than this engine's own: no other sequence may find it
        self.charged = 0  # tokens whose computing its tenant has been charged for
        self.started = False  # has had blocks
        self.cached_tokens = 0  # of the prompt, found in the prefix cache when it first started
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # once the prompt is computed, where asked for

    @classmethod
    def of(cls, request: Request, tag: int = 0) -> "Sequence":
        return cls(
            request.sequence_id,
            request.prompt,
            request.sampling,
            request.salt,
            priority=request.priority,
            tenant=request.tenant,
            tag=tag,
        )

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def max_length(self) -> int:
        """Tokens when the answer is as long as it may become."""
        return len(self.prompt) + self.sampling.max_tokens

    def tokens_between(self, start: int, end: int) -> Seq[int]:
        """Tokens [start, end) of prompt and answer."""
        split = len(self.prompt)
        if start >= split:
            return self.tokens[start - split : end - split]
        if end <= split:
            return self.prompt[start:end]
        return (*self.prompt[start:], *self.tokens[: end - split])

    def ids(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """The same as an array."""
        return np.array(self.tokens_between(start, end), dtype=np.int64)

    def take_blocks(self) -> list[BlockId]:
        """All its blocks, which are the caller's to release; the sequence has none, and no KV, after."""
        blocks, self.blocks = self.blocks, []
        self.computed = 0
        self.keys = []
        return blocks

    def end_reason(self) -> EndReason | None:
        """Why the answer is complete, or None while it is not."""
        if self.tokens and self.tokens[-1] in self.sampling.stop_token_ids:
            return EndReason.STOP
        if len(self.tokens) >= self.sampling.max_tokens:
            return EndReason.LENGTH
        return None
