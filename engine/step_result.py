"""What a step of the batch has brought, as its worker is told."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np

from ..core.errors import BatonError
from ..core.request import EndReason, TokenLogprobs
from .device_clock import DeviceTime
from .sequence import Sequence
from .step_input import I64


@dataclass(frozen=True, slots=True)
class StepStats:
    """Of the step that a call has launched; all zero where it launched none."""

    sequences: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    plan_s: float = 0.0  # who starts, who runs, the step's input
    forward_s: float = 0.0  # on a GPU: launching it
    collect_s: float = 0.0  # taking tokens in, and on a GPU waiting for them
    sample_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens that one step has given to S sequences, as columns; they are appended already."""

    sequences: list[Sequence]
    token_ids: I64  # [S]
    positions: I64  # [S] in its answer, from 0
    tags: I64  # [S] of its sequence
    logprobs: Mapping[int, TokenLogprobs]  # by place, of those that asked

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[tuple[Sequence, int, TokenLogprobs | None]]:
        """One by one: (sequence, token id, log probabilities)."""
        told = map(self.logprobs.get, range(len(self))) if self.logprobs else repeat(None, len(self))
        return zip(self.sequences, self.token_ids.tolist(), told, strict=True)


_NONE = np.empty(0, np.int64)


@dataclass(slots=True)
class StepResult:
    """What one call of `step` has brought."""

    started: list[Sequence] = field(default_factory=list)  # have blocks now, and `cached_tokens`
    advanced: list[Sequence] = field(default_factory=list)  # prompts whose KV has grown
    tokens: Chosen = Chosen([], _NONE, _NONE, _NONE, {})
    ended: list[tuple[Sequence, EndReason | BatonError]] = field(default_factory=list)  # they are gone from the batch
    stats: StepStats = StepStats()
    device: list[DeviceTime] = field(default_factory=list)  # of steps that are over, on a GPU
