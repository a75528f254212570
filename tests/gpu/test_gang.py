"""Ranks with a GPU each, of which one fails: every other error is told in seconds, and nobody waits for ever."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from baton.core.errors import ConfigError
from baton.core.ids import Epoch, WorkerId
from baton.engine.engine import Engine
from baton.engine.parallel.plan_channel import PlanReader
from baton.engine.parallel.shared_pool import PoolHandle
from baton.engine.step_input import StepInput
from baton.kernels import device_wait
from baton.kernels.device_wait import DeviceStuck
from baton.worker.config import WorkerConfig
from baton.worker.gang import Invitation, follow, lead

from ..batch_runs import Way, greedy, run
from ..ranks import Rank, Ranks

LATE_S = 3.0


class Told:
    """Rank 0's view of the others, over the tests' own pipes."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def invite(self, invitations: Sequence[Invitation]) -> None:
        self._rank.tell(invitations)

    def pools(self) -> Sequence[PoolHandle]:
        return self._rank.reports()


def config_of(path: Path, folder: Path) -> WorkerConfig:
    return WorkerConfig(
        worker_id=WorkerId("worker"),
        epoch=Epoch(1),
        role="both",
        model_dir=path,
        model_name="model",
        dtype="float32",
        device="cuda",
        tp=2,
        kv_bytes=16 << 20,
        start_timeout_s=60.0,
        redis_url="",
        ring_dir=folder,
        ring_name="gang",
        inbox="",
    )


def live(rank: Rank, config: WorkerConfig, fails: str) -> str:
    """One life of a worker of two ranks, in which the one that `fails` names does."""
    device = torch.device("cuda", rank.rank)
    torch.cuda.set_device(device)
    if rank.rank > 0:
        if fails == "loading":
            config = replace(config, max_model_len=1 << 20)  # more than the model has
        follow(config, rank.hear()[0], lambda handle: report(rank, handle, fails))
        return "followed"
    others = Told(rank)
    with lead(config, others) as followers:
        engine = Engine.build(
            config.model_dir,
            torch.float32,
            device,
            config.kv_bytes,
            max_batch=config.max_batch,
            followers=followers,
        )
        engine.open_pools(others.pools())
        sequences = [greedy(number, (2, 3, 5 + number), 8) for number in range(3)]
        run(engine, sequences, Way(step_tokens=64, join_every=0, lookahead=True))
        if fails == "leading":
            raise ZeroDivisionError("in a step")
    return str([seq.tokens for seq in sequences])


def report(rank: Rank, handle: PoolHandle, fails: str) -> None:
    rank.report(handle)
    if fails == "following":
        raise ZeroDivisionError("in a step")


@pytest.fixture
def pair() -> Iterator[Ranks]:
    """Made anew for each test: who failed is of no further use."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def test_two_lives_one_after_the_other_end_by_themselves(
    checkpoint: Callable[..., Path], pair: Ranks, tmp_path: Path
) -> None:
    answers = set()
    for life in ("one", "two"):
        config = replace(config_of(checkpoint("Llama"), tmp_path), ring_name=life)
        tokens, end = pair.run(live, 2, config, "nobody")
        assert end == "followed"
        answers.add(tokens)
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("fails", "rank", "error"),
    [("leading", 0, ZeroDivisionError), ("following", 1, ZeroDivisionError), ("loading", 1, ConfigError)],
)
def test_what_one_rank_raises_is_told_while_the_other_waits_for_it(
    fails: str, rank: int, error: type[Exception], checkpoint: Callable[..., Path], pair: Ranks, tmp_path: Path
) -> None:
    pair.start(live, 2, config_of(checkpoint("Llama"), tmp_path), fails)
    found = pair.results([rank])[rank]
    assert isinstance(found, error), found
    assert pair.processes[1 - rank].is_alive()  # it has nobody to tell it: who keeps the worker ends it


def wait_in_vain(rank: Rank, config: WorkerConfig) -> str:
    """Rank 1 hangs once a few steps have run."""
    device_wait.PATIENCE_S = LATE_S
    take, taken = PlanReader.take, count()

    def take_some(reader: PlanReader) -> StepInput | None:
        if next(taken) == 5:
            time.sleep(600)
        return take(reader)

    PlanReader.take = take_some  # type: ignore[method-assign]
    return live(rank, config, "nobody")


def test_rank_0_notices_that_another_hangs(checkpoint: Callable[..., Path], pair: Ranks, tmp_path: Path) -> None:
    pair.start(wait_in_vain, 2, config_of(checkpoint("Llama"), tmp_path))
    found = pair.results([0])[0]
    assert isinstance(found, DeviceStuck), found
    assert pair.processes[1].is_alive()
