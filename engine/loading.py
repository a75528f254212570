"""What every rank of a worker begins with: its part of the model, and the pool for the KV heads it holds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.tickets import Geometry
from ..kernels.build import BuildError, cuda_library
from ..kernels.paged_attention import is_fused
from ..kernels.prefill_attention import is_tiled
from .decode_graphs import SIZES, Capture, CudaCapture
from .executor import Executor
from .kv_cache import DTYPES, KvCache, num_blocks_for
from .models import Model, ModelConfig, Shard, load_model
from .parallel.alone import Alone
from .parallel.communicator import Communicator
from .parallel.peers import can_be_captured

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class RankPart:
    """Of one rank; equal arguments to `load_part` give all ranks of a worker equal numbers of blocks."""

    model: Model
    kv_cache: KvCache
    max_model_len: int

    def executor(self, max_batch: int) -> Executor:
        """Ranks that share a model call it with equal arguments."""
        max_blocks = -(-self.max_model_len // self.kv_cache.geometry.block_tokens)
        capture = self._capture()
        with torch.inference_mode():
            if capture is not None and (peers := self.model.head.communicator).size > 1:  # else no replay would end
                agreed = peers.broadcast(torch.tensor([max_batch], device=self.model.device)).item()
                assert agreed == max_batch, (agreed, max_batch)
            return Executor(self.model, self.kv_cache, max_batch, max_blocks, capture)

    def _capture(self) -> Capture | None:
        """None where a step waits for the device somewhere, or meets other ranks by other means than our kernels."""
        pool, model = self.kv_cache.pool, self.model
        if not (pool.is_cuda and is_fused(pool)):
            return None
        meets = can_be_captured(model.head.communicator, SIZES[-1], model.config.hidden_size, model.dtype)
        return CudaCapture(pool.device) if meets and model.config.experts is None else None


def load_part(
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    kv_bytes: int,
    block_tokens: int = 16,
    max_model_len: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    communicator: Communicator | None = None,
    shared: bool = False,
    deterministic: bool = False,
) -> RankPart:
    """Load a rank's part of a model directory and make its pool.

    kv_bytes: of this rank, the same for all. max_model_len: tokens of prompt and answer; None: what the model's
    configuration says. threads: of torch on the CPU, for the whole process; None: as they are. progress: called with
    (bytes done, bytes in all). communicator: with the other ranks; None: there are none. shared: other processes of
    this host may map the pool; that of another rank than the first they always may. deterministic: logits
    are bit for bit the same whatever else is in a step and however prompts are cut. Raises ValueError where the
    checkpoint can't be served or split so, or not deterministically, kv_bytes hold no block, or nvcc fails.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")  # float32 is float32: no TF32, whatever the environment asks for
    try:
        cuda_library(device)  # compiled now if it must be, not in the first request's step
    except BuildError as error:
        raise ValueError(str(error)) from error
    config = ModelConfig.from_dir(model_dir)
    length = max_model_len or config.max_position_embeddings
    if length > config.max_position_embeddings:
        raise ValueError(f"max_model_len {length} is beyond the model's {config.max_position_embeddings} positions")
    geometry = Geometry(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        block_tokens=block_tokens,
        dtype=_DTYPE_NAMES[dtype],
        fingerprint=config.kv_fingerprint(dtype),
        model=config.fingerprint,
    )
    peers: Communicator = Alone() if communicator is None else communicator
    heads = Shard(peers.rank, peers.size).kv_heads(config.num_kv_heads)
    if deterministic:
        _check_deterministic(config, dtype, device, block_tokens, peers.size)
    num_blocks = num_blocks_for(kv_bytes, geometry, heads)
    with torch.inference_mode():
        model = load_model(model_dir, config, dtype, device, progress, length, peers, deterministic)
        return RankPart(model, KvCache(num_blocks, geometry, device, heads, shared=shared or peers.rank > 0), length)


def _check_deterministic(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, block_tokens: int, ranks: int
) -> None:
    """Raises ValueError where no kernels do it. On the CPU tokens pass through the model one by one."""
    if config.experts is not None and cuda_library(device) is not None:
        raise ValueError("deterministic: a model with experts is so on the CPU alone, for want of kernels")
    if device.type != "cuda":
        return
    if ranks > 1:
        raise ValueError("deterministic: ranks on GPUs add their parts up in orders that change; tp must be 1")
    like = torch.empty(0, 1, 2, 1, block_tokens, config.head_size, dtype=dtype, device=device)
    if not is_tiled(like):
        raise ValueError(
            "deterministic: on a GPU this needs Hopper (H100, H200), bfloat16, heads of 64 or 128 and our kernels, not "
            f"{torch.cuda.get_device_name(device)}, {dtype} and heads of {config.head_size}"
        )
