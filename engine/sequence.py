"""The state of one generation on one engine."""

import numpy as np

from ..core.ids import BlockId, BlockKey, SequenceId
from ..core.request import EndReason, Request, Sampling
from .logit_edits import LogitEdits


class Sequence:
    """Prompt, answer so far, and the blocks that hold their KV.

    [0, computed) KV is in `blocks` | [computed, length) tokens known, KV still to do
    """

    def __init__(self, sequence_id: SequenceId, prompt: tuple[int, ...], sampling: Sampling, salt: str = "") -> None:
        """Raises ValueError for an empty prompt."""
        if not prompt:
            raise ValueError("a prompt has at least one token")
        self.sequence_id = sequence_id
        self.prompt = prompt
        self.sampling = sampling
        self.salt = salt
        self.tokens: list[int] = []  # of the answer
        self.blocks: list[BlockId] = []  # held for this sequence, in order; the engine's to change
        self.computed = 0
        self.keys: list[BlockKey] = []  # of the full blocks that the prefix cache knows by now
        self.ids = np.empty(len(prompt) + sampling.max_tokens, dtype=np.int64)  # prompt and answer; [:length] is valid
        self.ids[: len(prompt)] = prompt
        self.edits = LogitEdits.of(sampling, self.ids[: len(prompt)])  # None: nothing is asked for, or it is over
        self.table = np.empty(0, dtype=np.int32)  # blocks, as the batch wants them

    @classmethod
    def of(cls, request: Request) -> "Sequence":
        return cls(request.sequence_id, request.prompt, request.sampling, request.salt)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens known whose KV is still to be computed: the next chunk is at most that long."""
        return self.length - self.computed

    @property
    def max_length(self) -> int:
        """Tokens when the answer is as long as it may become."""
        return len(self.ids)

    def append(self, token: int) -> None:
        """One more token of the answer."""
        self.ids[self.length] = token
        self.tokens.append(token)
        if self.edits is not None:
            self.edits.add(token)
            if self.edits.spent:
                self.edits = None

    def give(self, blocks: list[BlockId]) -> None:
        """More blocks, which the caller holds for this sequence."""
        self.blocks += blocks
        self.table = np.array(self.blocks, dtype=np.int32)

    def take_blocks(self) -> list[BlockId]:
        """All its blocks, which are the caller's to release; the sequence has none, and no KV, after."""
        blocks, self.blocks = self.blocks, []
        self.table = np.empty(0, dtype=np.int32)
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
