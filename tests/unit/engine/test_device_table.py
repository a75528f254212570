"""The table of parameters that a GPU keeps, its kernels run on the CPU: as rows come, go on, are preempted and go."""

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.engine.device_table import DeviceSamplingTable, sampling_table
from baton.engine.engine import Engine
from baton.engine.sampler import sample
from baton.engine.sampling_table import SamplingTable
from baton.engine.sequence import Sequence
from baton.kernels import sampling
from baton.kernels.sampling import MAX_VOCABULARY

from ...batch_runs import Way, run
from ...emulation import library as emulation
from .sampling import CPU, PROMPT, choose
from .test_sampled_equality import sampling_of
from .test_sampling_table import LOGITS, PLAIN, ROWS, SAMPLINGS, VOCAB

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=f"emulation: {emulation.missing()}")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """Of sampling alone."""
    library = emulation.compile_for_cpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "cuda_library", lambda device: library)
        patch.setattr(sampling, "stream", lambda device: 0)
        patch.setattr(sampling, "multiprocessors", lambda device: emulation.MULTIPROCESSORS)
        yield


class Batch(RuleBasedStateMachine):
    """Sequences come, are given tokens and leave: each row then is as if its sequence had just been put, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = DeviceSamplingTable(ROWS, VOCAB, CPU)
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
        rows = np.array(sorted(self.sequences), np.int64)
        if len(rows):
            self.table.chosen(self.table.take(rows, rows * 0), torch.tensor(tokens)[rows])
        for row, (params, answer) in self.sequences.items():
            self.sequences[row] = params, [*answer, tokens[row]]

    @invariant()
    def each_row_is_as_if_it_were_alone_and_new(self) -> None:
        positions = [len(self.sequences[row][1]) if row in self.sequences else 0 for row in range(ROWS)]
        together = sample(LOGITS, self.table.take(np.arange(ROWS), np.array(positions))).to_host().result()
        for row in range(ROWS):
            params, answer = self.sequences.get(row, (PLAIN, []))
            alone = choose(LOGITS[row : row + 1], [params], [positions[row]], [answer])
            assert together.token_ids[row] == alone.token_ids[0]
            assert (row in together.logprobs) == (0 in alone.logprobs)


Batch.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestBatch = Batch.TestCase


def sequences(count: int) -> list[Sequence]:
    dice, made = random.Random(3), []
    for number in range(count):
        prompt = tuple(dice.randrange(2, 1500) for _ in range(dice.randint(1, 60)))
        params = Sampling(max_tokens=10, logprobs=[None, 3][number % 2], **sampling_of(number))
        made.append(Sequence(SequenceId(f"r/{number}"), prompt, params))
    return made


def test_a_batch_gives_the_answers_that_it_gives_without_the_kernels(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that join late, are preempted and come back, a step planned while another runs."""
    counted = []
    count_tokens = sampling.count_tokens
    monkeypatch.setattr(
        "baton.engine.device_table.count_tokens", lambda *given: (counted.append(1), count_tokens(*given))
    )
    way = Way(step_tokens=40, join_every=2, lookahead=True, ballast=5)
    found = sequences(10)
    preempted = run(build(vocab_size=1500, num_blocks=24, block_tokens=16), found, way)
    assert preempted.recomputed
    assert counted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "cuda_library", lambda device: None)
        expected = sequences(10)
        run(build(vocab_size=1500, num_blocks=24, block_tokens=16), expected, way)
    assert [seq.tokens for seq in found] == [seq.tokens for seq in expected]


def test_the_table_is_the_one_that_serves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(sampling_table(2, VOCAB, CPU), DeviceSamplingTable)
    assert isinstance(sampling_table(2, MAX_VOCABULARY + 1, CPU), SamplingTable)
    monkeypatch.setattr(sampling, "cuda_library", lambda device: None)
    assert isinstance(sampling_table(2, VOCAB, CPU), SamplingTable)


def test_a_row_is_sent_once_and_a_plain_batch_needs_nothing() -> None:
    table = DeviceSamplingTable(3, VOCAB, CPU)
    table.put(0, PLAIN, PROMPT)
    table.put(1, Sampling(max_tokens=9, presence_penalty=1.0), PROMPT, [5])
    order = np.arange(3)
    plain = table.take(order[[0, 2]], order[[0, 2]] * 0)
    assert plain.on_device is not None
    assert plain.on_device.at is None
    sent = []
    send = table._staging.send
    table._staging.send = lambda arrays: (sent.append(len(arrays)), send(arrays))[1]  # type: ignore[method-assign]
    for _ in range(3):
        table.take(order, order)
    assert sent == [10, 2, 2]
    table.clear(1)
    assert table.take(order, order).on_device.at is None  # type: ignore[union-attr]


def test_rows_and_positions_are_as_many() -> None:
    with pytest.raises(AssertionError):
        DeviceSamplingTable(4, VOCAB, CPU).take(np.array([0, 1]), np.array([0]))
