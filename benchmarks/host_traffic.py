"""Workers on a model that computes nothing, and a router that keeps one of them full."""

import cProfile
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from baton.core.frames import HandOver
from baton.core.ids import SequenceId
from baton.core.request import EndReason, Request, Sampling
from baton.core.tickets import Geometry
from baton.engine import batch as engine_batch
from baton.engine.engine import Engine
from baton.engine.kv_cache import KvCache
from baton.kv_transfer.loopback import Hub
from baton.wire.codec import frame_from_bytes
from baton.worker.records import Kind

from .machine import ROOT
from .workloads import MOST, Dice

sys.path.insert(0, str(ROOT))  # the workers that the tests build without processes
from tests.workers import VOCAB, Worker

BLOCK_TOKENS = 16
_PROMPTS = (16, 49)  # tokens
_MEAN_BLOCKS = 24  # of a sequence when it ends, twice the mean: no step waits for a block
_LINK = 1

# None: a kernel reads the tables, as on a GPU. The torch path's plans stand for the kernel's own work.
engine_batch.plan_decode = lambda *_: None
engine_batch.plan_prefill = lambda *_: None
engine_batch.plan_write = lambda *_: None


@dataclass(frozen=True)
class _Config:
    vocab_size: int = VOCAB
    windows: tuple[None, ...] = (None,)


class NoModel:
    """Prepared logits; KV stays as it is."""

    config = _Config()
    device = torch.device("cpu")

    def __init__(self, most_rows: int) -> None:
        self._logits = torch.rand(most_rows, VOCAB)

    def forward(self, batch: Any, pool: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(batch.token_ids if batch.wanted is None else batch.wanted)]


def engine(sequences: int) -> Engine:
    geometry = Geometry(
        num_layers=1, num_kv_heads=1, head_size=16, block_tokens=BLOCK_TOKENS, dtype="bfloat16", fingerprint="none"
    )
    cache = KvCache(sequences * _MEAN_BLOCKS + 4 * MOST // BLOCK_TOKENS, geometry, torch.device("cpu"))
    return Engine(NoModel(4096), cache, max_model_len=2 * MOST, max_batch=sequences)


class Traffic:
    """A router with some more sequences on their way than the worker's batch holds, so that none leaves a hole."""

    def __init__(self, folder: Path, role: str, sequences: int) -> None:
        folder.chmod(0o700)
        on_their_way = sequences + sequences // 8 + 8
        settings: dict[str, Any] = {"step_tokens": 2 * sequences + 512, "lookahead": True}
        settings["max_waiting"] = 2 * on_their_way
        hub, clock = Hub(), time.monotonic
        self._feeder: Worker | None = None
        if role == "decode":
            self._feeder = Worker(folder, hub, "P", engine(on_their_way), clock, **settings)
        self._worker = Worker(folder, hub, "D" if self._feeder else "B", engine(sequences), clock, **settings)
        self._dice, self._random, self._numbers = Dice(10_000), np.random.default_rng(5), itertools.count(1)
        self.ended = 0
        for _ in range(on_their_way):
            self._admit()

    @property
    def running(self) -> int:
        return self._worker.role.state().load.running

    def turn(self, profile: cProfile.Profile | None = None) -> float:
        """One turn of the worker's loop, and what all others do after it. Gives the turn's seconds."""
        if profile is not None:
            profile.enable()
        begin = time.perf_counter()
        self._worker.loop.turn()
        seconds = time.perf_counter() - begin
        if profile is not None:
            profile.disable()
        self._worker.crank.run()
        self._hear(self._worker)
        while self._feeder is not None:
            worked, _ = self._feeder.loop.turn()
            worked |= bool(self._feeder.crank.run())
            self._hear(self._feeder)
            if not worked:
                break
        return seconds

    def _hear(self, worker: Worker) -> None:
        for record in worker.heard():
            if record.kind is not Kind.FRAME:
                continue
            frame = frame_from_bytes(record.body)
            for granted in frame.tickets:
                assert self._feeder is not None
                self._feeder.send(HandOver(sequence_id=granted.sequence_id, ticket=granted.ticket), link=_LINK)
            for ended in frame.ended:
                assert ended.reason in (EndReason.LENGTH, EndReason.HANDED_OVER), ended
                if worker is self._worker:
                    self.ended += 1
                    self._admit()

    def _admit(self) -> None:
        number = next(self._numbers)
        request = Request(
            sequence_id=SequenceId(f"{number:032x}/0"),
            prompt=tuple(self._random.integers(0, VOCAB, int(self._random.integers(*_PROMPTS))).tolist()),
            sampling=Sampling(max_tokens=max(self._dice.lengths(1)[0], 2), temperature=0.0),
            number=number,
        )
        for worker in filter(None, (self._feeder, self._worker)):
            worker.send(request, link=_LINK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in filter(None, (self._feeder, self._worker)):
            worker.close()
