"""What a request asks to change in its logits before a token is chosen: bias, penalties, no end before `min_tokens`.

And masks, of which a grammar makes a new one for each token.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.request import Sampling

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]
_BIAS, _REPETITION, _PENALTY = range(3)  # rows of the values
_NEUTRAL = np.array([[0.0], [1.0], [0.0]], dtype=np.float32)
_FIRST_ROOM = 64  # tokens


class LogitEdits:
    """One sequence's edits: a table of the tokens that they touch, brought up to date by each token of the answer.

        x + bias; then divided by repetition where above 0, else multiplied; then - penalty

    The table follows from parameters, prompt and answer alone, in the order of vLLM: whichever worker knows these has
    the same one. A token that may not be chosen yet has the bias -inf.
    """

    def __init__(self, sampling: Sampling, prompt: Seq[int]) -> None:
        self._sampling = sampling
        self._penalises = penalises(sampling)
        seen = np.unique(np.array(prompt if sampling.repetition_penalty != 1 else (), np.int64))
        self._size = len(seen)
        self._ids = np.empty(len(seen) + _FIRST_ROOM, dtype=np.int64)
        self._ids[: len(seen)] = seen
        self._values = np.repeat(_NEUTRAL, len(self._ids), axis=1)
        self._values[_REPETITION, : len(seen)] = sampling.repetition_penalty
        self._slots = {token: slot for slot, token in enumerate(seen.tolist())}
        self._counts: dict[int, int] = {}  # of the answer's tokens
        self._length = 0  # of the answer
        for token, bias in sampling.logit_bias:
            self._put(token, _BIAS, bias)
        if sampling.min_tokens:
            for token in sorted(sampling.stop_token_ids):
                self._put(token, _BIAS, -np.inf)

    @classmethod
    def of(cls, sampling: Sampling, prompt: Seq[int], answer: Iterable[int] = ()) -> "LogitEdits | None":
        """None where nothing is asked for, or nothing any more after this answer."""
        if not (penalises(sampling) or sampling.logit_bias or sampling.min_tokens):
            return None
        edits = cls(sampling, prompt)
        for token in answer:
            edits.add(token)
        return None if edits.spent else edits

    @property
    def spent(self) -> bool:
        """Nothing is changed any more."""
        return not (self._penalises or self._sampling.logit_bias or self._length < self._sampling.min_tokens)

    @property
    def token_ids(self) -> Ids:
        """The n tokens that are touched, each once."""
        return self._ids[: self._size]

    @property
    def values(self) -> Values:
        """[3, n]: bias, repetition and penalty of each."""
        return self._values[:, : self._size]

    def add(self, token: int) -> None:
        """The answer goes on with this token."""
        sampling = self._sampling
        self._length += 1
        if self._length == sampling.min_tokens:
            bias = dict(sampling.logit_bias)
            for stop in sampling.stop_token_ids:
                self._put(stop, _BIAS, bias.get(stop, 0.0))
        if self._penalises:
            count = self._counts[token] = self._counts.get(token, 0) + 1
            self._put(token, _REPETITION, sampling.repetition_penalty)
            self._put(token, _PENALTY, sampling.presence_penalty + sampling.frequency_penalty * count)

    def _put(self, token: int, which: int, value: float) -> None:
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = self._size
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._values = np.concatenate([self._values, np.repeat(_NEUTRAL, slot, axis=1)], axis=1)
            self._ids[slot] = token
            self._size += 1
        self._values[which, slot] = value


def penalises(sampling: Sampling) -> bool:
    """It changes the logits of tokens that are there already."""
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class EditedPlaces:
    """The logits [S, V] that edits touch, each once. Tensors are on the logits' device."""

    at: Tensor  # [n] i64 = row * V + token
    values: Tensor  # [3, n] f32: bias, repetition and penalty of each


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens some rows of the logits may choose at all: structured output. Tensors are on the logits' device."""

    rows: Tensor  # [S'] i64: which rows of the logits, each at most once
    bits: Tensor  # [S', ceil(V / 32)] i32: token t may be chosen where bit t % 32 of word t // 32 is 1


def places_of(edits: Seq[LogitEdits], rows: Ids, vocab_size: int) -> tuple[Ids, Values]:
    """EditedPlaces as arrays.    rows [len(edits)] i64: the row of the logits that each edits."""
    places = np.concatenate([edit.token_ids + row * vocab_size for edit, row in zip(edits, rows.tolist(), strict=True)])
    return places, np.concatenate([edit.values for edit in edits], axis=1)


def edited(logits: Tensor, places: EditedPlaces) -> Tensor:
    """A copy of the logits [S, V] in f32 with the edits. What is NaN stays it, and so does what is +inf, as NaN."""
    bias, repetition, penalty = places.values
    copy = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    flat = copy.view(-1)
    before = flat[places.at]
    found = before + bias
    found = torch.where(found > 0, found / repetition, found * repetition) - penalty
    found.clamp_(max=torch.finfo(torch.float32).max)  # a tiny repetition penalty gives no infinity
    flat[places.at] = found.masked_fill(before == torch.inf, torch.nan)
    return copy


def masked(logits: Tensor, masks: TokenMasks) -> Tensor:
    """A copy of the logits [S, V] in f32: -inf where a mask has a 0. What is NaN stays it; +inf there becomes it."""
    vocab_size = logits.shape[1]
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((masks.bits[:, :, None] >> shifts) & 1).flatten(1)[:, :vocab_size].bool()
    change = torch.zeros(allowed.shape, device=logits.device).masked_fill_(~allowed, -torch.inf)
    return logits.float().index_add(0, masks.rows, change)
