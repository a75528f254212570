"""The second stage of a step: from its logits to tokens, on the device and then on the host.

Apart from the forward pass, so that what it depends on may come late: counts for penalties now, a grammar's mask. What
the host must know of the tokens before is brought up to date by `settle`, which comes between the two stages.
"""

import numpy as np
from torch import Tensor

from ..kernels.device_wait import mark, wait_for
from .device_table import sampling_table
from .engine import Engine
from .flight import Flight, PromptPart
from .logprobs import PendingLogprobs, PromptLogprobs, ranked_logprobs
from .sampler import Sampled, sample
from .sequence import Sequence
from .staging import Staging
from .step_input import I64

_NO_ROWS = np.empty(0, np.int64)
_NOTHING = Sampled(_NO_ROWS, True, {})


class SamplingStage:
    """Owns the parameters of every row. Runs on the leading rank alone."""

    def __init__(self, engine: Engine) -> None:
        self._executor = engine.executor
        self._staging = Staging(engine.device)
        self._table = sampling_table(engine.max_batch, engine.config.vocab_size, engine.device)
        self._prompts: dict[Sequence, PromptLogprobs] = {}

    def put(self, row: int, seq: Sequence) -> None:
        """The row is this sequence's from now on; it may have tokens already."""
        self._table.put(row, seq.sampling, seq.prompt, seq.tokens)

    def clear(self, row: int, seq: Sequence) -> None:
        """The row is free. What is known of a prompt by then is asked for again, should the sequence come back."""
        self._table.clear(row)
        self._prompts.pop(seq, None)

    def settle(self, rows: I64, token_ids: I64) -> None:
        """These tokens are part of their answers now.    rows [S], token_ids [S]."""
        edited = self._table.edited_rows
        if edited:
            for row, token in zip(rows.tolist(), token_ids.tolist(), strict=True):
                if row in edited:
                    self._table.add(row, token)

    def launch(self, flight: Flight) -> None:
        """Choose a token for each row of a step that was launched; nothing here waits for it."""
        logits, flight.logits = flight.logits, None
        assert logits is not None, "the step was sampled from already"
        at: Tensor | None = None
        if flight.prompt_parts or flight.sampled_at is not None:
            # In one copy: another's buffer might be one that the step before has still to read.
            arrays = [part.next_ids for part in flight.prompt_parts]
            *of_parts, at = self._staging.send([*arrays, _NO_ROWS if flight.sampled_at is None else flight.sampled_at])
            flight.prompt_logprobs = [
                (part, _prompt_logprobs(part, logits, next_ids))
                for part, next_ids in zip(flight.prompt_parts, of_parts, strict=True)
            ]
        if not len(flight.sampled_rows):
            flight.done = mark(logits.device)
            return
        if at is not None and flight.sampled_at is not None:
            logits = logits.index_select(0, at)
        rows = self._table.take(flight.sampled_rows, flight.positions)
        drawn = sample(logits, rows)
        self._table.chosen(rows, drawn.token_ids)
        self._executor.accept(drawn.token_ids)
        flight.pending = drawn.to_host()

    def take(self, flight: Flight) -> Sampled:
        """What was chosen. On a GPU this waits until the step is over: it reads and writes no block any more."""
        for part, pending in flight.prompt_logprobs:
            self._add(part, pending)
        if flight.pending is None:
            wait_for(flight.done)
            return _NOTHING
        return flight.pending.result()

    def _add(self, part: PromptPart, pending: PendingLogprobs) -> None:
        seq = part.sequence
        known = self._prompts.get(seq)
        if known is None:
            known = self._prompts[seq] = PromptLogprobs(len(seq.prompt))
        known.add(part.first, pending.result())
        if known.complete:
            seq.prompt_logprobs = known.result()
            del self._prompts[seq]


def _prompt_logprobs(part: PromptPart, logits: Tensor, next_ids: Tensor) -> PendingLogprobs:
    count = part.sequence.sampling.prompt_logprobs or 0
    return ranked_logprobs(logits[part.begin : part.end], next_ids, count).to_host()
