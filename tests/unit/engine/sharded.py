"""An engine over several ranks, and one alone, that answer the same prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.core.tickets import Geometry
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.engine import Engine
from baton.engine.loading import load_part
from baton.engine.parallel.communicator import Communicator
from baton.engine.parallel.follower import Follower, Followers
from baton.engine.parallel.gpus import meet_on_gpus
from baton.engine.parallel.plan_channel import PlanReader, PlanWriter
from baton.engine.parallel.rendezvous import Rendezvous
from baton.engine.policies import policy
from baton.engine.sequence import Sequence
from baton.engine.step_input import StepInput

from ...ranks import Rank, free_port

CPU = torch.device("cpu")
KV_BYTES = 1 << 20
MAX_BATCH = 8


@dataclass(frozen=True)
class Answers:
    tokens: list[list[int]]
    logits: Tensor  # [rows of all steps, vocab]
    geometry: Geometry
    pool_shapes: list[tuple[int, ...]]
    swapped: int  # how often a sequence's KV went to host memory


@dataclass(frozen=True)
class Setting:
    """How an engine is built, and what it is asked."""

    path: Path
    prompts: list[tuple[int, ...]]
    new_tokens: int = 12
    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # or "cuda": each rank has a GPU of its own
    kv_bytes: int = KV_BYTES  # of each rank
    swap_bytes: int = 0

    def engine(self, followers: Followers | None = None) -> Engine:
        device = self.device_of(0)
        return Engine.build(self.path, self.dtype, device, self.kv_bytes, max_batch=MAX_BATCH, followers=followers)

    def device_of(self, rank: int) -> torch.device:
        return torch.device(self.device, rank) if self.device == "cuda" else CPU


class Watched:
    """Keeps the logits that pass."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.logits: list[Tensor] = []

    def forward(self, step: StepInput) -> Tensor:
        logits: Tensor = self._executor.forward(step)
        self.logits.append(logits.clone())
        return logits

    def accept(self, token_ids: Tensor) -> None:
        self._executor.accept(token_ids)


def answer(setting: Setting, engine: Engine) -> Answers:
    """Greedy, chunked, a new one in each step."""
    watched = Watched(engine.executor)
    engine.executor = watched
    batch = ContinuousBatch(engine, policy("hybrid"), step_tokens=48, swap_bytes=setting.swap_bytes)
    sampling = Sampling(max_tokens=setting.new_tokens, temperature=0.0)
    sequences = [Sequence(SequenceId(f"r/{i}"), prompt, sampling) for i, prompt in enumerate(setting.prompts)]
    waiting = list(sequences)
    while any(seq.end_reason() is None for seq in sequences):
        if waiting:
            batch.add(waiting.pop(0))
        batch.step(0.0)
    engine.ledger.check()
    shapes = [tuple(pool.shape) for pool in engine.rank_pools]
    logits = torch.cat(watched.logits).cpu()
    return Answers([seq.tokens for seq in sequences], logits, engine.geometry, shapes, batch.preemptions.swapped)


def alone(setting: Setting) -> Answers:
    return answer(setting, setting.engine())


def meet(rank: Rank, device: torch.device) -> Communicator:
    if device.type == "cpu":
        return rank.meet()
    torch.cuda.set_device(device)
    url = rank.agree(f"tcp://127.0.0.1:{free_port()}")
    return meet_on_gpus(Rendezvous(url, rank.rank, rank.size), device)


def serve(rank: Rank, setting: Setting) -> Answers | None:
    """Rank 0 answers, the others follow."""
    device = setting.device_of(rank.rank)
    with_others = meet(rank, device)
    if rank.rank > 0:
        plans = PlanReader.join(rank.hear()[rank.rank - 1], rank.rank, rank.size)
        part = load_part(setting.path, setting.dtype, device, setting.kv_bytes, communicator=with_others)
        assert part.kv_cache.shared is not None
        rank.report(part.kv_cache.shared.handle)
        Follower(part.executor(MAX_BATCH), plans, with_others, device).run()
        with_others.barrier()
        return None
    writer = PlanWriter(rank.size - 1)
    rank.tell(writer.addresses)
    engine = setting.engine(Followers(with_others, writer))
    engine.open_pools(rank.reports())
    answers = answer(setting, engine)
    writer.stop()
    with_others.barrier()
    return answers
