"""A worker's processes as Ray actors. They wrap `worker/` and the worker folders and add nothing to them.

All take over their process's output, so that all that a worker says is in one log. The cluster token travels by the
environment of the node, never in an actor's arguments.
"""

import asyncio
import os
import queue
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from ..core.errors import ConfigError
from ..engine.memory import GPU_LEAST, GPU_WORKSPACE, kv_room, usable_bytes
from ..observe import logs
from ..worker.config import WorkerConfig
from ..worker.records import Progress
from .screen import percent
from .units import format_size

if TYPE_CHECKING:  # torch: in the ranks' processes only, not where the classes are named
    from ..engine.parallel.shared_pool import PoolHandle
    from ..worker.gang import Invitation

Item = TypeVar("Item")

_FOLDERS = {"prefill": "prefill_worker", "decode": "decode_worker", "both": "colocated_worker"}


class RankActor:
    """The step loop's process. `deliver` and `greet` run beside `run`, each in a thread of its own, so calls keep their
    order."""

    def __init__(
        self,
        config: WorkerConfig,
        log: Path,
        log_level: str,
        gpu_share: float,
        weight_bytes: int,
        followers: Sequence[Any] = (),
    ) -> None:
        """weight_bytes: of one rank. followers: the `FollowerActor`s of ranks 1, 2, ..."""
        from ..kv_transfer.inbox import Inbox  # noqa: PLC0415

        _log_to(log, log_level, config)
        self._config = _with_token(config)
        self._gpu_share = gpu_share
        self._weight_bytes = weight_bytes
        self._followers = followers
        self._inbox = Inbox()

    def run(self) -> None:
        """One life of the rank: returns when its service says stop."""
        config = self._config
        if config.kv_bytes == 0:
            config = replace(config, kv_bytes=self._kv_bytes(config.start_timeout_s))
        rank = import_module(f"..{_FOLDERS[config.role]}.rank", __package__)  # torch comes with it
        others = RayFollowers(self._followers, config.start_timeout_s) if self._followers else None
        rank.run(config, self._inbox, others=others)

    def _kv_bytes(self, timeout_s: float) -> int:
        """What the fullest of the ranks' GPUs has for KV. Raises ConfigError, RankLost."""
        from ..engine.parallel.communicator import RankLost  # noqa: PLC0415

        asked = [one.room.remote() for one in self._followers]
        own = gpu_kv_bytes(self._gpu_share, self._weight_bytes)
        try:
            rooms: list[int] = ray.get(asked, timeout=timeout_s)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if cause is not None:  # what a follower found is this worker's to tell
                raise cause from None
            raise RankLost(f"a rank did not say what its GPU has room for: {error}") from error
        return min([own, *rooms])

    @ray.method(concurrency_group="inbox")
    def deliver(self, message: bytes, handles: Sequence[object]) -> None:
        """What a peer's rank tells this one: see kv_transfer/inbox.py."""
        from ..kv_transfer.inbox import deliver  # noqa: PLC0415

        deliver(self._inbox, message, handles)

    @ray.method(concurrency_group="greet")
    def greet(self, record: bytes) -> bytes:
        """A peer's rank asks how KV can come to this one: see kv_transfer/inbox.py."""
        from ..kv_transfer.inbox import greet  # noqa: PLC0415

        return greet(self._inbox, record)


class RayFollowers:
    """See worker/gang.py's OtherRanks."""

    def __init__(self, actors: Sequence[Any], timeout_s: float) -> None:
        self._actors = actors
        self._timeout_s = timeout_s
        self._joining: list[Any] = []

    def invite(self, invitations: Sequence["Invitation"]) -> None:
        self._joining = [actor.join.remote(one) for actor, one in zip(self._actors, invitations, strict=True)]

    def pools(self) -> Sequence["PoolHandle"]:
        from ..engine.parallel.communicator import RankLost  # noqa: PLC0415

        try:
            handles: list[PoolHandle] = ray.get(self._joining, timeout=self._timeout_s)
        except ray.exceptions.RayError as error:  # one that is late among them
            raise RankLost(f"a rank did not load its part: {error}") from error
        return handles


class FollowerActor:
    """The process of another rank than the first. `room` and `join` run beside `run`, in a thread of their own."""

    def __init__(self, config: WorkerConfig, log: Path, log_level: str, gpu_share: float, weight_bytes: int) -> None:
        _log_to(log, log_level, config)
        self._config = config
        self._gpu_share = gpu_share
        self._weight_bytes = weight_bytes
        self._invitations: queue.SimpleQueue[Invitation] = queue.SimpleQueue()
        self._handles: queue.SimpleQueue[PoolHandle] = queue.SimpleQueue()

    def run(self) -> None:
        """One life: returns when rank 0 has run its last step."""
        from ..worker.gang import follow  # noqa: PLC0415

        follow(self._config, self._next(self._invitations, "no invitation of rank 0"), self._handles.put)

    @ray.method(concurrency_group="gang")
    def room(self) -> int:
        """Bytes for KV on this rank's GPU. Raises ConfigError."""
        return gpu_kv_bytes(self._gpu_share, self._weight_bytes)

    @ray.method(concurrency_group="gang")
    def join(self, invitation: "Invitation") -> "PoolHandle":
        """Once this rank has loaded its part: how rank 0 reaches its pool."""
        self._invitations.put(invitation)
        return self._next(self._handles, "no part of the model loaded")

    def _next(self, waited_for: "queue.SimpleQueue[Item]", otherwise: str) -> "Item":
        """Raises RankLost where it does not come in time."""
        from ..engine.parallel.communicator import RankLost  # noqa: PLC0415

        timeout_s = self._config.start_timeout_s
        try:
            return waited_for.get(timeout=timeout_s)
        except queue.Empty:
            raise RankLost(f"{otherwise} within {timeout_s:.0f} s") from None


class ServiceActor:
    """The gRPC process. Its loop is Ray's actor loop."""

    def __init__(self, config: WorkerConfig, log: Path, log_level: str) -> None:
        _log_to(log, log_level, config)
        self._config = _with_token(config)
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self._progress = "starting"

    async def run(self) -> None:
        """One life of the service: returns after `stop`; raises WorkerLost when the rank dies."""
        from ..worker.service import serve  # noqa: PLC0415

        await serve(self._config, self._stop, self._set_ready, self._set_progress)

    async def wait_ready(self) -> None:
        await self._ready.wait()

    async def progress(self) -> str:
        return self._progress

    async def stop(self) -> None:
        """Drain within the configured bound and leave."""
        self._stop.set()

    def _set_ready(self, *_: object) -> None:
        self._ready.set()

    def _set_progress(self, progress: Progress) -> None:
        self._progress = f"loading {percent(progress.loaded_bytes, progress.total_bytes)}"


def gpu_kv_bytes(share: float, weight_bytes: int) -> int:
    """What is left for KV of a rank's part of its GPU. Raises ConfigError with the arithmetic."""
    import torch  # noqa: PLC0415

    free, total = torch.cuda.mem_get_info()
    part = min(free, usable_bytes(total, share))
    left = kv_room(part, weight_bytes)
    if left < GPU_LEAST:
        raise ConfigError(
            f"Not enough GPU memory: {format_size(part)} of {format_size(total)} are this rank's, less "
            f"{format_size(weight_bytes)} weights and {format_size(GPU_WORKSPACE)} workspace leaves "
            f"{format_size(max(0, left))} for KV: choose a smaller model, fewer workers per GPU, or more ranks (--tp)."
        )
    return left


def _log_to(log: Path, level: str, config: WorkerConfig) -> None:
    """Point this process's standard output and error, C++ included, at the worker's log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    logs.setup(config.log_format, level, str(config.worker_id), os.fdopen(file, "w", buffering=1))


def _with_token(config: WorkerConfig) -> WorkerConfig:
    return replace(config, cluster_token=os.environ["BATON_CLUSTER_TOKEN"])
