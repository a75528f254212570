"""Logits to tokens. The random number behind a token is a function of (seed, branch, position) alone.

rows = table.take(batch_rows, positions)        # sampling_table.py
drawn = sample(logits, rows)                    # starts the work; waits for nothing
pending = drawn.to_host()                       # the same
sampled = pending.result()                      # waits
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.request import TokenLogprobs
from ..kernels.sampling import Masks, RowTables, SamplingWorkspace, TokensOut, choose_tokens
from .draws import DrawRows, draw
from .logit_edits import EditedPlaces, TokenMasks, edited, masked
from .logprobs import PendingLogprobs, RankedLogprobs, ranked_logprobs
from .ranking import first_best
from .staging import HostCopy
from .step_input import I64

NO_TOKEN = -1  # of a row whose logits give none


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """The rows of the logits whose logprobs are wanted."""

    at: Tensor | None  # [L] i64, on the logits' device; None: all rows have some, of which these are looked at
    rows: tuple[int, ...]  # L, the same
    counts: tuple[int, ...]  # L: how many of the best

    @property
    def most(self) -> int:
        return max(self.counts)


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Where a GPU has the parameters of S rows of logits. Its kernels choose, as docs/sampling.md says."""

    workspace: SamplingWorkspace
    tables: RowTables | None = None  # None, with the next two: all rows are greedy
    at: Tensor | None = None  # [S] i32: rows of the tables
    positions: Tensor | None = None  # [S] i32: of the token in its answer
    more: bool = False  # some row draws or asks for logprobs
    counts: bool = False  # some row must learn which token it is given


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How to choose a token for each of S rows of logits. A row of which no part speaks is greedy."""

    count: int  # S
    draws: tuple[DrawRows, ...] = ()  # each row in one at most
    edits: EditedPlaces | None = None
    masks: TokenMasks | None = None
    logprobs: LogprobRows | None = None
    on_device: DeviceRows | None = None  # instead of draws and edits


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was chosen, as the host knows it."""

    token_ids: I64  # [S]; NO_TOKEN where the logits gave none
    complete: bool  # they gave one for each
    logprobs: dict[int, TokenLogprobs]  # by row of the logits, of those that asked


class Pending:
    """Chosen tokens on their way to the host."""

    def __init__(self, chosen: HostCopy, logprobs: PendingLogprobs | None, rows: LogprobRows | None) -> None:
        """chosen: token_ids [S] i64 and largest [S] f32, as `Drawn` has them."""
        self._chosen = chosen
        self._logprobs = logprobs
        self._rows = rows

    def ready(self) -> bool:
        """result() would not wait."""
        return self._chosen.ready() and (self._logprobs is None or self._logprobs.ready())

    def result(self) -> Sampled:
        """Waits until the copy is here."""
        chosen, largest = (part.numpy() for part in self._chosen.wait())
        usable = np.isfinite(largest)
        complete = bool(usable.all())
        token_ids = chosen if complete else np.where(usable, chosen, NO_TOKEN)
        if self._logprobs is None or self._rows is None:
            return Sampled(token_ids, complete, {})
        found = self._logprobs.result(self._rows.counts, self._rows.rows if self._rows.at is None else None)
        return Sampled(token_ids, complete, dict(zip(self._rows.rows, found, strict=True)))


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was chosen, on the logits' device."""

    token_ids: Tensor  # [S] i64; some token where the logits gave none
    largest: Tensor  # [S] f32, of the logits; not finite where they gave none
    logprobs: RankedLogprobs | None = None  # of `logprob_rows`
    logprob_rows: LogprobRows | None = None

    def to_host(self) -> Pending:
        """Starts the copies; waits for nothing."""
        logprobs = None if self.logprobs is None else self.logprobs.to_host()
        return Pending(HostCopy([self.token_ids, self.largest]), logprobs, self.logprob_rows)


def sample(logits: Tensor, rows: SamplingRows) -> Drawn:
    """One token per row.    logits [S, V], which stay as they are

    Edits and masks, then temperature, then top-k, then top-p, then min-p, each on what the one before left; the order
    of transformers. Logprobs are those before all of these.

    `largest` is not finite where a row holds NaN or +inf, or nothing finite, or where its mask leaves nothing: such a
    row gets some token here, and on the host NO_TOKEN.
    """
    assert logits.shape[0] == rows.count, (logits.shape, rows.count)
    if rows.on_device is not None:
        return _chosen_by_kernels(logits, rows, rows.on_device)
    values = logits if rows.edits is None else edited(logits, rows.edits)
    # In f32: torch's argmax of bfloat16 is three times as slow on a CPU.
    values = values.float() if rows.masks is None else masked(values, rows.masks)
    largest, best = first_best(values)
    token_ids = best
    for group in rows.draws:
        drawn = draw(values, best, group)
        token_ids = drawn if group.at is None else token_ids.index_copy(0, group.at, drawn)
    # The largest is NaN where any is, and edits and masks make NaN of +inf: so the logit there tells of all. That edits
    # leave nothing (each token a stop token, before min_tokens) is no fault of the logits: some token is chosen. The
    # host looks at it, for whom that costs less than three operations more cost on the device.
    if rows.edits is not None or rows.masks is not None:
        largest = logits.gather(1, best[:, None])[:, 0].float()
    if rows.masks is not None:
        largest = _allowed(largest, values, best, rows.masks)
    if rows.logprobs is None:
        return Drawn(token_ids, largest)
    at = rows.logprobs.at
    assert at is not None
    found = ranked_logprobs(logits[at], token_ids[at], rows.logprobs.most)
    return Drawn(token_ids, largest, found, rows.logprobs)


def _chosen_by_kernels(logits: Tensor, rows: SamplingRows, its: DeviceRows) -> Drawn:
    out = TokensOut.empty(rows.count, rows.logprobs.most if rows.logprobs else 0, logits.device)
    masks: Masks | None = None
    if rows.masks is not None:
        of = torch.full((rows.count,), -1, dtype=torch.int32, device=logits.device)
        numbers = torch.arange(len(rows.masks.rows), dtype=torch.int32, device=logits.device)
        masks = Masks(rows.masks.bits, of.index_copy_(0, rows.masks.rows, numbers))
    choose_tokens(logits, out, its.workspace, its.tables, its.at, its.positions, masks, more=its.more)
    found = RankedLogprobs(out.own, out.top, out.top_ids) if rows.logprobs else None
    return Drawn(out.token_ids, out.largest, found, rows.logprobs)


def _allowed(largest: Tensor, values: Tensor, best: Tensor, masks: TokenMasks) -> Tensor:
    """NaN for those to whom a mask leaves nothing: what it forbids must not be said.    largest [S] f32"""
    nothing_left = values.gather(1, best[:, None])[:, 0].index_select(0, masks.rows) == -torch.inf
    kept = largest.index_select(0, masks.rows).masked_fill(nothing_left, torch.nan)
    return largest.index_copy(0, masks.rows, kept)
