"""The table of parameters, as sequences come, go on and leave."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.core.request import Sampling
from baton.engine.sampler import SamplingRows, sample
from baton.engine.sampling_table import SamplingTable

from .sampling import CPU, PROMPT, choose

VOCAB, ROWS = 40, 6
LOGITS = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
PLAIN = Sampling(max_tokens=99, temperature=0.0)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(99),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([0.7, 1.0]),
    seed=st.integers(0, 9),
    logprobs=st.sampled_from([None, None, 0, 2]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    min_tokens=st.sampled_from([0, 0, 2]),
    stop_token_ids=st.just(frozenset(range(0, VOCAB, 2))),
)


class Batch(RuleBasedStateMachine):
    """Sequences come, say tokens and leave: each row then is as if its sequence had just been put, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SamplingTable(ROWS, VOCAB, CPU)
        self.sequences: dict[int, tuple[Sampling, list[int]]] = {}

    @rule(row=st.integers(0, ROWS - 1), sampling=SAMPLINGS, answer=st.lists(st.integers(0, VOCAB - 1), max_size=3))
    def put(self, row: int, sampling: Sampling, answer: list[int]) -> None:
        self.table.put(row, sampling, PROMPT, answer)
        self.sequences[row] = sampling, answer

    @rule(row=st.integers(0, ROWS - 1))
    def clear(self, row: int) -> None:
        self.table.clear(row)
        self.sequences.pop(row, None)

    @rule(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=ROWS, max_size=ROWS))
    def go_on(self, tokens: list[int]) -> None:
        for row, (sampling, answer) in self.sequences.items():
            if row in self.table.edited_rows:
                self.table.add(row, tokens[row])
            self.sequences[row] = sampling, [*answer, tokens[row]]

    @invariant()
    def each_row_is_as_if_it_were_alone_and_new(self) -> None:
        positions = [len(self.sequences[row][1]) if row in self.sequences else 0 for row in range(ROWS)]
        together = sample(LOGITS, self.table.take(np.arange(ROWS), np.array(positions))).to_host().result()
        for row in range(ROWS):
            sampling, answer = self.sequences.get(row, (PLAIN, []))
            alone = choose(LOGITS[row : row + 1], [sampling], [positions[row]], [answer])
            assert together.token_ids[row] == alone.token_ids[0]
            assert (row in together.logprobs) == (0 in alone.logprobs)

    @invariant()
    def a_batch_of_plain_rows_is_taken_as_one(self) -> None:
        rest = [row for row in range(ROWS) if row not in self.sequences or self.sequences[row][0] == PLAIN]
        if rest:
            assert self.table.take(np.array(rest), np.zeros(len(rest))) == SamplingRows(len(rest))


Batch.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestBatch = Batch.TestCase


def test_only_rows_with_edits_must_be_told_of_tokens_and_no_longer_than_these_last() -> None:
    table = SamplingTable(4, VOCAB, CPU)
    table.put(0, PLAIN, PROMPT)
    table.put(1, Sampling(max_tokens=9, temperature=0.0, min_tokens=2, stop_token_ids=frozenset({1})), PROMPT)
    table.put(2, Sampling(max_tokens=9, presence_penalty=1.0), PROMPT)
    table.put(3, Sampling(max_tokens=9, min_tokens=2, stop_token_ids=frozenset({1})), PROMPT, [5, 6])
    assert table.edited_rows == {1, 2}
    table.add(1, 7)
    assert table.edited_rows == {1, 2}
    table.add(1, 8)
    assert table.edited_rows == {2}
    assert table.take(np.array([0, 1]), np.array([2, 2])) == SamplingRows(2)
    table.clear(2)
    table.clear(2)
    assert table.edited_rows == set()


def test_when_all_rows_draw_alike_none_are_gathered_and_greedy_ones_never_draw() -> None:
    table = SamplingTable(4, VOCAB, CPU)
    table.put(0, PLAIN, PROMPT)
    for row in (1, 2):
        table.put(row, Sampling(max_tokens=9), PROMPT)
    table.put(3, Sampling(max_tokens=9, top_k=3), PROMPT)
    (alike,) = table.take(np.array([2, 1]), np.array([0, 0])).draws
    assert alike.at is None
    mixed = table.take(np.array([3, 0, 1, 0, 2]), np.zeros(5))
    assert [rows.at.tolist() for rows in mixed.draws if rows.at is not None] == [[2, 4], [0]]


def test_rows_and_positions_are_as_many() -> None:
    with pytest.raises(AssertionError):
        SamplingTable(4, VOCAB, CPU).take(np.array([0, 1]), np.array([0]))
