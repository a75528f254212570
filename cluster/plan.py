"""What a cluster will be made of, decided before anything starts."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core.errors import ConfigError
from ..core.ids import Epoch, WorkerId
from ..engine.cpu import computes_bfloat16
from ..engine.memory import free_memory
from ..router.config import RouterConfig
from ..text.model_source import served_name
from ..worker.config import ROLES, WorkerConfig
from . import preflight
from .config import ServeConfig

_GPU_FOLDER = Path("/proc/driver/nvidia/gpus")
_DEVICES = Path("/dev")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """One worker, whatever life it is in."""

    config: WorkerConfig  # of no life yet: epoch 0, no names
    log: Path
    log_level: str
    gpu_share: float  # of one GPU, for each rank; 0: none
    rank_weight_bytes: int

    @property
    def worker_id(self) -> WorkerId:
        return self.config.worker_id

    def config_of(self, epoch: Epoch) -> WorkerConfig:
        """Of one life. Ring and inbox are named for it, so that nothing meets what an earlier life left."""
        name = f"{self.worker_id}.{epoch}"
        return replace(self.config, epoch=epoch, ring_name=name, inbox=name)

    def remove_rings(self, epoch: Epoch) -> None:
        """What a killed life left in shared memory."""
        for path in self.config.ring_dir.glob(f"{self.worker_id}.{epoch}.*"):
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    config: ServeConfig
    model_dir: Path
    model_name: str
    size: preflight.ModelSize
    prefill_size: preflight.ModelSize  # the same model, as prefill workers run it
    max_model_len: int  # tokens of prompt and answer
    kv_bytes: int  # of each worker; 0: what its GPU has free
    swap_bytes: int  # of host memory, of each worker that decodes
    num_gpus: int
    api_keys: tuple[str, ...] = field(repr=False)
    cluster_token: str = field(repr=False)

    def workers(self, redis_url: str, rings: Path, logs: Path) -> list[WorkerPlan]:
        config = self.config
        names = [(role, n) for role in ROLES for n in range(getattr(config, role))]
        sizes = {role: self.prefill_size if role == "prefill" else self.size for role in ROLES}
        return [
            WorkerPlan(
                config=WorkerConfig(
                    worker_id=WorkerId(f"{role}-{n}"),
                    epoch=Epoch(0),
                    role=role,
                    model_dir=self.model_dir,
                    model_name=self.model_name,
                    dtype=sizes[role].dtype,
                    device="cuda" if self.num_gpus else "cpu",
                    tp=config.tp_of(role),
                    kv_bytes=self.kv_bytes // config.tp_of(role),
                    block_tokens=config.block_tokens_of(role),
                    transport=config.transport,
                    kv_checksums=config.kv_checksums,
                    max_model_len=self.max_model_len,
                    max_batch=config.max_batch,
                    step_tokens=config.step_tokens,
                    policy=config.policy,
                    swap_bytes=0 if role == "prefill" else self.swap_bytes,
                    threads=config.threads,
                    deterministic=config.deterministic,
                    drain_timeout_s=float(config.drain_s),
                    start_timeout_s=float(config.start_s),
                    redis_url=redis_url,
                    cluster_name=config.cluster_name,
                    otlp_endpoint=config.otlp_endpoint,
                    log_format=config.log_format,
                    ring_dir=rings,
                    ring_name="",
                    inbox="",
                ),
                log=logs / f"{role}-{n}.log",
                log_level=config.log_level,
                gpu_share=gpu_share(self.num_gpus, config.num_ranks),
                rank_weight_bytes=sizes[role].rank_weight_bytes,
            )
            for role, n in names
        ]

    def router(self, redis_url: str) -> RouterConfig:
        config = self.config
        return RouterConfig(
            model_dir=self.model_dir,
            model_name=self.model_name,
            redis_url=redis_url,
            cluster_name=config.cluster_name,
            cluster_token=self.cluster_token,
            host=config.host,
            grpc_port=config.grpc_port,
            http_port=config.http_port,
            metrics_port=config.metrics_port,
            api_keys=self.api_keys,
            tls_certificate=Path(config.tls_cert).resolve() if config.tls_cert else None,
            tls_key=Path(config.tls_key).resolve() if config.tls_key else None,
            otlp_endpoint=config.otlp_endpoint,
            log_format=config.log_format,
            log_level=config.log_level.upper(),
            drain_s=float(config.drain_s),
        )


def plan_cluster(config: ServeConfig, model_dir: Path, api_keys: tuple[str, ...], cluster_token: str) -> ClusterPlan:
    """Raises ConfigError when the model, the context or the memory does not work out."""
    num_gpus = count_gpus(config.device)
    preflight.check_gpus(config, num_gpus)
    # A model in bfloat16 is no use on a CPU that would take ten times as long for it.
    dtype = "float32" if config.dtype == "auto" and not num_gpus and not computes_bfloat16() else config.dtype
    size = preflight.measure_model(model_dir, dtype, config.tp)
    prefill_size = preflight.measure_model(model_dir, config.prefill_dtype or dtype, config.tp_of("prefill"))
    context = preflight.settle_context(config, size)
    # Memory is reckoned as if all workers were like the largest.
    largest = max(size, prefill_size, key=lambda one: one.weight_bytes + context * one.kv_bytes_per_token)
    free_bytes = free_memory()
    kv_bytes = config.kv_memory or 0
    if not num_gpus:
        kv_bytes = preflight.settle_kv_bytes(config, largest, context, free_bytes)
    swap_bytes = preflight.settle_swap_bytes(config, largest, 0 if num_gpus else kv_bytes, free_bytes)
    return ClusterPlan(
        config=config,
        model_dir=model_dir,
        model_name=config.served_name or served_name(config.model, model_dir),
        size=size,
        prefill_size=prefill_size,
        max_model_len=context,
        kv_bytes=kv_bytes,
        swap_bytes=swap_bytes,
        num_gpus=num_gpus,
        api_keys=api_keys,
        cluster_token=cluster_token,
    )


def gpu_share(num_gpus: int, num_ranks: int) -> float:
    """Of one GPU for each rank, so that all fit: a whole one, or an equal part of a shared one."""
    return 1.0 / math.ceil(num_ranks / num_gpus) if num_gpus else 0.0


def count_gpus(
    device: str,
    environment: Mapping[str, str] = os.environ,
    folder: Path = _GPU_FOLDER,
    devices: Path = _DEVICES,
) -> int:
    """GPUs that we may use, without loading torch. Raises ConfigError when they are asked for and none is there.

    Some containers and sandboxes show the GPUs' device nodes alone, without the driver's folder.
    """
    if device == "cpu":
        return 0
    found = len(list(folder.iterdir())) if folder.is_dir() else 0
    found = found or sum(node.name.removeprefix("nvidia").isdigit() for node in devices.glob("nvidia*"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [part for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        found = min(found, len(named))
    if device == "cuda" and found == 0:
        raise ConfigError("--device is cuda, but no GPU is here: check `nvidia-smi`, or choose --device cpu.")
    return found
