"""What processes of the tests beside this file do."""

import os
import signal
import time
from typing import Any

import torch
from torch import Tensor

from baton.engine.parallel.communicator import RankLost
from baton.engine.parallel.follower import Follower, Followers, Leader
from baton.engine.parallel.gloo import Gloo
from baton.engine.parallel.plan_channel import PlanReader, PlanWriter
from baton.engine.parallel.rendezvous import Rendezvous
from baton.engine.parallel.shared_pool import SharedPool, open_pool
from baton.engine.step_input import StepInput

from ....ranks import Rank
from .steps import a_step, number_of

CPU = torch.device("cpu")
PLACE_BYTES = 4096  # small, so that most tensors take several meetings
SLOT_BYTES = 1024  # small, so that most steps take several slots
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def part_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 16 + rank)
    return (torch.randn(shape, generator=generator) * 100).to(dtype)


def idle(seconds: float) -> None:
    """Busily: a nap may take much longer than asked for."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def meet_over_tcp(rank: Rank, url: str, cases: list[tuple[str, tuple[int, ...], str, int]]) -> list[Tensor]:
    """As `meet_often`, through gloo; torch's default group is left alone."""
    with_others = Gloo(Rendezvous(url, rank.rank, rank.size, timeout_s=30.0), "127.0.0.1")
    assert not torch.distributed.is_initialized()
    results = [
        getattr(with_others, kind)(part_of(rank.rank, shape, DTYPES[dtype], seed)) for kind, shape, dtype, seed in cases
    ]
    with_others.barrier()
    with_others.close()
    return results


def meet_often(rank: Rank, cases: list[tuple[str, tuple[int, ...], str, int]]) -> list[Tensor]:
    """Each rank comes a little later or earlier than the last time."""
    with_others, results = rank.meet(place_bytes=PLACE_BYTES), []
    for kind, shape, dtype, seed in cases:
        x = part_of(rank.rank, shape, DTYPES[dtype], seed)
        idle((seed * (rank.rank + 1) % 7) * 2e-5)
        results.append(getattr(with_others, kind)(x))
    with_others.barrier()
    with_others.close()
    return results


def broadcast_ids(rank: Rank) -> list[int]:
    with_others = rank.meet()
    ids = torch.arange(5) + 2**40 if rank.rank == 0 else torch.zeros(5, dtype=torch.int64)
    with_others.broadcast(ids)
    with_others.barrier()
    return ids.tolist()


def meet_until_lost(rank: Rank, victim: int, at: int) -> float:
    """The victim dies after so many meetings. Seconds that the others' last meeting took to fail."""
    with_others, x = rank.meet(timeout_s=60.0), torch.ones(1000)
    for meeting in range(at + 10):
        if rank.rank == victim and meeting == at:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.perf_counter()
        try:
            with_others.all_reduce(x)
        except RankLost:
            return time.perf_counter() - start
    raise AssertionError("nobody noticed")


def come_alone(rank: Rank) -> str:
    """Rank 0 reduces, the other one does not come."""
    with_others = rank.meet(timeout_s=0.3)
    if rank.rank == 0:
        try:
            with_others.all_reduce(torch.ones(3))
        except RankLost as late:
            return str(late)
    return ""


def plans_of(rank: Rank) -> PlanWriter | PlanReader:
    if rank.rank == 0:
        writer = PlanWriter(rank.size - 1, slot_bytes=SLOT_BYTES)
        rank.tell(writer.addresses)
        return writer
    return PlanReader.join(rank.hear()[rank.rank - 1], rank.rank, rank.size)


def hand_on_plans(rank: Rank, sizes: list[int], slow_rank: int) -> list[tuple[int, int]]:
    """(number, tokens) of each step, as written and as read."""
    plans = plans_of(rank)
    if isinstance(plans, PlanWriter):
        for number, size in enumerate(sizes):
            plans.put(a_step(number, chunk_tokens=size))
        plans.stop()
        return list(enumerate(sizes))
    found = []
    while (step := plans.take()) is not None:
        found.append((number_of(step), len(step.chunk_ids)))
        if rank.rank == slow_rank:
            idle(0.004)  # long enough for the others to fall asleep
    return found


def sleep_for_plans(rank: Rank, times: int) -> float:
    """Each plan comes long after the reader has fallen asleep. Seconds of processor time that a reader took."""
    plans = plans_of(rank)
    if isinstance(plans, PlanWriter):
        for number in range(times):
            time.sleep(0.1)
            plans.put(a_step(number))
        plans.stop()
        return 0.0
    before, count = time.process_time(), 0
    while plans.take() is not None:
        count += 1
    assert count == times
    return time.process_time() - before


def lead_and_die(rank: Rank) -> str:
    plans = plans_of(rank)
    if isinstance(plans, PlanWriter):
        plans.put(a_step(0))
        idle(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        assert plans.take() is not None
        try:
            plans.take()
        except RankLost as lost:
            return str(lost)
    return ""


class FakeExecutor:
    """The next token of a row is a hash of what it has accepted; only rank 0 knows how to choose."""

    def __init__(self, rows: int) -> None:
        self.last_tokens = torch.zeros(rows, dtype=torch.int64)
        self.log: list[tuple[int, tuple[int, ...]]] = []

    def forward(self, step: StepInput) -> Tensor:
        self.log.append((number_of(step), tuple(self.last_tokens.tolist())))
        return self.last_tokens.clone()

    def accept(self, token_ids: Tensor) -> None:
        self.last_tokens[: len(token_ids)] = token_ids  # the rows of a step are the first ones


def lead_and_follow(rank: Rank, steps: int) -> list[Any]:
    """The log of each rank's executor."""
    with_others, plans, executor = rank.meet(), plans_of(rank), FakeExecutor(4)
    if isinstance(plans, PlanWriter):
        leader = Leader(executor, Followers(with_others, plans))
        for number in range(steps):
            step = a_step(number, rows=1 + number % 4)
            logits = leader.forward(step)
            leader.accept(logits[: len(step.sampled_rows)] * 31 + number)
        plans.stop()
    else:
        Follower(executor, plans, with_others, torch.device("cpu")).run()
    with_others.barrier()
    return executor.log


def write_into_each_other(rank: Rank) -> list[float]:
    """Rank 0 makes a pool, rank 1 opens it; both write."""
    with_others = rank.meet()
    if rank.rank == 0:
        made = SharedPool.create((4, 8), torch.float32, CPU)
        rank.tell(made.handle)
        pool = made.tensor
    else:
        pool = open_pool(rank.hear(), CPU)
    pool[rank.rank] = 5 + rank.rank
    with_others.barrier()
    return pool[:, 7].tolist()
