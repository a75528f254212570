"""Stand-ins that several folders' tests share: a model whose answers depend on all of its KV, and threads by hand."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.core.tickets import Geometry
from baton.engine.engine import Engine
from baton.engine.kv_cache import KvCache

VOCAB = 97
GEOMETRY = Geometry(
    num_layers=1, num_kv_heads=1, head_size=16, block_tokens=16, dtype="float32", fingerprint="a fake model"
)


@dataclass(frozen=True)
class _Config:
    vocab_size: int = VOCAB
    windows: tuple[None, ...] = (None,)


class FakeModel:
    """Writes each token and its position as KV, and chooses the next token from all KV in the sequence's blocks."""

    config = _Config()
    device = torch.device("cpu")
    exact = False

    def forward(self, batch: Any, pool: Tensor) -> Tensor:
        keys, values = pool[:, 0, 0, 0], pool[:, 0, 1, 0]  # [N, P, D]
        block, offset = batch.slots // GEOMETRY.block_tokens, batch.slots % GEOMETRY.block_tokens
        keys[block, offset] = batch.token_ids[:, None].float()
        values[block, offset] = batch.positions[:, None].float()
        rows = self._contexts(batch)
        wanted = range(len(batch.token_ids)) if batch.wanted is None else batch.wanted.tolist()
        logits = torch.zeros(len(wanted), VOCAB)
        for i, row in enumerate(wanted):
            table, length = rows[row]
            logits[i, _choice(keys[table].reshape(-1, 16)[:length], values[table].reshape(-1, 16)[:length])] = 9.0
        return logits

    @staticmethod
    def _contexts(batch: Any) -> dict[int, tuple[Tensor, int]]:
        rows = {}
        if batch.decode is not None:
            for i in range(batch.num_decode):
                rows[i] = (batch.decode.block_tables[i].long(), int(batch.decode.context_lens[i]))
        if batch.prefill is not None:
            part = batch.prefill
            for i, end in enumerate(part.query_starts[1:]):
                table, length = part.block_tables[i].long(), int(part.context_lens[i])
                for back in range(end - part.query_starts[i]):
                    rows[batch.num_decode + end - 1 - back] = (table, length - back)
        return rows


def _choice(keys: Tensor, values: Tensor) -> int:
    total = (keys.long() * (values.long() + 3)).sum() // 16 + 7 * len(keys)
    return int(total % VOCAB)


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What the fake model says after `prompt`, greedily, computed from its definition alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((sum(token * (i + 3) for i, token in enumerate(tokens)) + 7 * len(tokens)) % VOCAB)
    return tokens[len(prompt) :]


def fake_engine(num_blocks: int = 64, max_model_len: int = 512, max_batch: int = 8) -> Engine:
    """A real engine over the fake model."""
    cache = KvCache(num_blocks, GEOMETRY, torch.device("cpu"))
    return Engine(FakeModel(), cache, max_model_len, max_batch)  # type: ignore[arg-type]


class HandCranked(Executor):
    """Runs what was submitted only when a test says so, on the test's own thread."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def begin(self, at: int = 0) -> Callable[[], None] | None:
        """Take one up: it can't be cancelled any more. Gives what ends it; None when it was cancelled, or is none."""
        if not self.waiting:
            return None
        self.waiting.rotate(-at)
        future, work = self.waiting.popleft()
        if not future.set_running_or_notify_cancel():
            return None

        def end() -> None:
            try:
                result = work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        return end

    def run(self) -> int:
        """All that waits; gives how many."""
        ran = 0
        while self.waiting:
            end = self.begin()
            if end is not None:
                end()
                ran += 1
        return ran
