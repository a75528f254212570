"""The engine: one model on one device, its KV pool, and who holds what of it. What is in a step, and when, is decided
in continuous_batch.py.

    engine = Engine.build(model_dir, torch.bfloat16, torch.device("cpu"), kv_bytes=1 << 28)
    batch = ContinuousBatch(engine, policy("hybrid"))
    batch.add(Sequence(SequenceId("r/0"), prompt, Sampling(max_tokens=20, temperature=0.0)), now)
    while (result := batch.step(now)) is not None:
        ...
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.generations import Generations
from ..core.tickets import Geometry
from .kv_cache import KvCache
from .ledger import Ledger, OutOfBlocks
from .loading import RankPart, load_part
from .models import Model, ModelConfig, Shard
from .parallel.follower import Followers, Leader, StepExecutor
from .parallel.shared_pool import PoolHandle, open_pool
from .prefix_cache import PrefixCache

__all__ = ["Engine", "OutOfBlocks"]


class Engine:
    """One thread owns it. Blocks move between holders through `ledger` alone. Of ranks that share a model, the first
    has one; the others are `Follower`s."""

    def __init__(
        self,
        model: Model,
        kv_cache: KvCache,
        max_model_len: int,
        max_batch: int,
        followers: Followers | None = None,
    ) -> None:
        self.config: ModelConfig = model.config
        self.kv_cache = kv_cache
        self.geometry: Geometry = kv_cache.geometry
        self.generations = Generations.create(kv_cache.num_blocks) if kv_cache.shared is not None else None
        renew = self.generations.renew if self.generations is not None else None
        self.ledger = Ledger(kv_cache.num_blocks, renew)
        self.prefix_cache = PrefixCache(self.ledger, self.geometry.block_tokens, self.geometry.fingerprint)
        self.max_model_len = max_model_len
        self.max_batch = max_batch
        self.device: torch.device = model.device
        own = RankPart(model, kv_cache, max_model_len).executor(max_batch)
        self.executor: StepExecutor = own if followers is None else Leader(own, followers)
        self.rank_pools: tuple[Tensor, ...] = (kv_cache.pool,)  # [N, L, 2, G_r, P, D] of each rank
        self.rank_heads: tuple[range, ...] = (kv_cache.heads,)  # the KV heads in each
        self.rank_handles: tuple[PoolHandle, ...] = () if kv_cache.shared is None else (kv_cache.shared.handle,)

    @classmethod
    def build(
        cls,
        model_dir: Path,
        dtype: torch.dtype,
        device: torch.device,
        kv_bytes: int,
        block_tokens: int = 16,
        max_model_len: int | None = None,
        max_batch: int = 256,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        followers: Followers | None = None,
        shared: bool = False,
        deterministic: bool = False,
    ) -> "Engine":
        """Load a model directory and make its pool; see `load_part`. followers: the ranks that hold the other parts,
        which are loaded with equal arguments; None: this one holds all."""
        communicator = None if followers is None else followers.communicator
        part = load_part(
            model_dir,
            dtype,
            device,
            kv_bytes,
            block_tokens,
            max_model_len,
            threads,
            progress,
            communicator,
            shared,
            deterministic,
        )
        return cls(part.model, part.kv_cache, part.max_model_len, max_batch, followers)

    def open_pools(self, handles: Sequence[PoolHandle]) -> None:
        """Map the followers' pools, in the order of their ranks, before any block leaves or enters ours."""
        size, total = len(handles) + 1, self.geometry.num_kv_heads
        self.rank_pools = (self.kv_cache.pool, *(open_pool(handle, self.device) for handle in handles))
        self.rank_heads = tuple(Shard(rank, size).kv_heads(total) for rank in range(size))
        if self.rank_handles:
            self.rank_handles = (self.rank_handles[0], *handles)
