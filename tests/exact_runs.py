"""Runs sequences through a deterministic engine in different ways, and compares their logits bit for bit."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.engine import Engine
from baton.engine.flight import Flight
from baton.engine.scheduler import StepPlan
from baton.engine.sequence import Sequence

from .batch_runs import Way, run

Seen = dict[tuple[str, int], Tensor]  # (sequence, which token of its answer) -> logits it was chosen from


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """The logits of all that is sampled meanwhile. Those of the same token are the same bits, or it fails."""
    seen: Seen = {}
    launch = ContinuousBatch._launch

    def watching(self: ContinuousBatch, plan: StepPlan) -> Flight:
        flight = launch(self, plan)
        assert flight.logits is not None
        assert flight.sampled_at is None
        for row, position, logits in zip(flight.sampled_rows, flight.positions, flight.logits, strict=True):
            key = str(self._rows.sequence(int(row)).sequence_id), int(position)
            assert torch.equal(seen.setdefault(key, logits.clone()), logits), key
        return flight

    with monkeypatch.context() as patch:
        patch.setattr(ContinuousBatch, "_launch", watching)
        yield seen


def bits(logits: Tensor) -> bytes:
    return logits.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def some_sequences(seed: int, longest: int) -> list[Sequence]:
    """Some begin alike, or are the same; some answers are drawn."""
    dice = random.Random(seed)
    common = [dice.randrange(2, 200) for _ in range(longest)]
    found = []
    for index in range(6):
        shared = dice.choice([0, 0, 16, 17, 33, longest // 2])
        own = [dice.randrange(2, 200) for _ in range(dice.choice([1, 2, 15, 16, 30, longest // 2]))]
        prompt = tuple(common[:shared] + own) if index != 4 else found[-1].prompt
        sampling = Sampling(max_tokens=dice.choice([2, 6, 20]), temperature=float(index % 2), seed=index)
        found.append(Sequence(SequenceId(f"r/{index}"), prompt, sampling))
    return found


def alone(engine: Engine, sequences: list[Sequence], monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Of each by itself, its prompt in one chunk, and nothing cached."""
    whole: Seen = {}
    for seq in sequences:
        engine.ledger.drop_cached()
        with watched(monkeypatch) as seen:
            run(engine, [seq], Way(step_tokens=4096))
        whole |= seen
    engine.ledger.drop_cached()
    return whole


def check(engine: Engine, seed: int, longest: int, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(engine, some_sequences(seed, longest), monkeypatch)
    for again in range(2):  # the second time much is in the prefix cache, answers too
        with watched(monkeypatch) as seen:
            run(engine, some_sequences(seed, longest), way)
        assert seen.keys() == expected.keys()
        different = [key for key in seen if bits(seen[key]) != bits(expected[key])]
        assert not different, (again, different)
