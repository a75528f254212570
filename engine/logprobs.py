"""Log probabilities of tokens, before edits, temperature and filters: of the answer's and of the prompt's."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.request import TokenLogprobs
from ..kernels.sampling import MAX_BEST, MAX_VOCABULARY, SamplingWorkspace, TokensOut, serves, token_logprobs
from .ranking import best_first, parts
from .staging import HostCopy

_AT_ONCE = 4096  # rows of logits, of a prompt, for the kernels


@dataclass(frozen=True, slots=True)
class RankedLogprobs:
    """Of n tokens, on the logits' device: their own, and the k best at each place (ties by rising id)."""

    own: Tensor  # [n] f32
    top: Tensor  # [n, k] f32, best first
    top_ids: Tensor  # [n, k] i64

    def to_host(self) -> "PendingLogprobs":
        """Starts the copy."""
        return PendingLogprobs(HostCopy([self.own, self.top, self.top_ids]))


class PendingLogprobs:
    """Ranked logprobs on their way to the host."""

    def __init__(self, copy: HostCopy) -> None:
        self._copy = copy

    def ready(self) -> bool:
        return self._copy.ready()

    def result(self, counts: Seq[int] | None = None, rows: Seq[int] | None = None) -> list[TokenLogprobs]:
        """Waits. counts: how many of the best each token is given; None: all k. rows: of which tokens; None: all."""
        parts = self._copy.wait()
        if rows is not None and len(rows) < len(parts[0]):
            parts = [part[list(rows)] for part in parts]
        own, top, top_ids = (part.tolist() for part in parts)
        wanted = [None] * len(own) if counts is None else counts
        return [
            TokenLogprobs(logprob, tuple(zip(ids[:count], values[:count], strict=True)))
            for logprob, ids, values, count in zip(own, top_ids, top, wanted, strict=True)
        ]


@torch.inference_mode()
def ranked_logprobs(logits: Tensor, token_ids: Tensor, count: int) -> RankedLogprobs:
    """The logprobs of these tokens, and of the `count` best.    logits [n, V]; token_ids [n] i64, -1 as if it were 0

    Of an answer, the tokens that were chosen by these logits; of a prompt, those that follow. Nothing here waits for a
    GPU.
    """
    rows, vocab_size = logits.shape
    assert token_ids.shape == (rows,), (token_ids.shape, logits.shape)
    if count <= MAX_BEST and vocab_size <= MAX_VOCABULARY and serves(logits.device):
        return _by_kernels(logits, token_ids, min(count, vocab_size))
    found = [
        _ranked(logits[part].float(), token_ids[part].clamp(min=0), min(count, vocab_size))
        for part in parts(rows, vocab_size, logits.device)
    ]
    own, top, top_ids = (torch.cat(column) for column in zip(*found, strict=True))
    return RankedLogprobs(own, top, top_ids)


def _by_kernels(logits: Tensor, token_ids: Tensor, count: int) -> RankedLogprobs:
    rows, found = len(logits), []
    for start in range(0, max(rows, 1), _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, rows))
        out = replace(TokensOut.empty(part.stop - start, count, logits.device), token_ids=token_ids[part].contiguous())
        token_logprobs(logits[part], out, count, SamplingWorkspace())
        found.append((out.own, out.top, out.top_ids))
    own, top, top_ids = (torch.cat(column) for column in zip(*found, strict=True))
    return RankedLogprobs(own, top, top_ids)


def _ranked(values: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    best = values.amax(-1, keepdim=True)
    log_sum = (values - best).exp_().sum(-1, keepdim=True).log_()
    # Ranked by the logits: rounding makes equals of logprobs whose logits differ.
    top, top_ids = best_first(values, count)
    own = values.gather(1, token_ids[:, None])
    return ((own - best) - log_sum)[:, 0], (top - best) - log_sum, top_ids


class PromptLogprobs:
    """What is known of one prompt's logprobs while its chunks are computed, in order."""

    def __init__(self, prompt_length: int) -> None:
        self._length = prompt_length
        self._known: list[TokenLogprobs | None] = [None]  # nothing comes before the first token

    def add(self, first: int, logprobs: Seq[TokenLogprobs]) -> None:
        """Of the prompt's tokens [first, first + n): those that follow a chunk's tokens, as far as the prompt goes."""
        assert first == len(self._known), f"token {first} comes where {len(self._known)} is next"
        assert first + len(logprobs) <= self._length, "more logprobs than the prompt has tokens"
        self._known += logprobs

    @property
    def complete(self) -> bool:
        return len(self._known) == self._length

    def result(self) -> tuple[TokenLogprobs | None, ...]:
        """One for each token of the prompt; None for the first."""
        assert self.complete, f"{len(self._known)} of {self._length} tokens"
        return tuple(self._known)
