"""Ray on this machine: one node of our own, with its token authentication on, and the gangs that run in it."""

import logging
import os
import secrets
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.errors import BatonError, ConfigError
from ..core.ids import Epoch
from .plan import WorkerPlan
from .supervisor import Death

NAMESPACE = "baton"
_STORE_BYTES = 512 << 20  # KV on its way from rank to rank; what is not pulled in time is withdrawn
_STOP_S = 5.0
_SERVICE_CALLS = 8  # run, wait_ready, progress and stop side by side


def start(num_gpus: int, cluster_token: str, folder: Path) -> None:
    """Start a node and connect to it. Raises ConfigError.

    Never joins a cluster that runs here already ("local"), never tells anyone of it (usage statistics are off).
    """
    # The node's processes and all actors inherit these.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_DEDUP_LOGS"] = "0"
    # Ray's only way to say "for this machine alone": else each of its processes listens on all interfaces.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["BATON_CLUSTER_TOKEN"] = cluster_token
    os.environ.pop("RAY_ADDRESS", None)
    import ray  # noqa: PLC0415  # reads the environment above when it is imported

    # It would put its own handler of SIGTERM before ours.
    ray._private.utils.set_sigterm_handler = lambda _: None
    # Ray's page of text about each worker that ends: the supervisor says it in one line.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    # A terminal that closes sends SIGHUP to all of its processes: Ray's, which inherit this mask, are ours to end.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray names no class for what may go wrong here
        reason = _first_line(error)
        raise ConfigError(f"Ray did not start: {reason}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop() -> None:
    import ray  # noqa: PLC0415

    with suppress(Exception):  # the sweep ends what this leaves
        ray.shutdown()


class RayGang:
    """One life of a worker: its ranks' actors and its service's actor, detached, never restarted by Ray itself."""

    def __init__(self, worker: WorkerPlan, epoch: Epoch) -> None:
        import ray  # noqa: PLC0415

        from . import actors  # noqa: PLC0415  # imports Ray

        self._worker = worker
        self._epoch = epoch
        config = worker.config_of(epoch)
        remote: Any = ray.remote  # its stubs know no concurrency groups
        options = {"num_cpus": 0, "max_restarts": 0, "lifetime": "detached", "namespace": NAMESPACE}
        rank = remote(num_gpus=worker.gpu_share, concurrency_groups={"inbox": 1, "greet": 1}, **options)(
            actors.RankActor
        )
        follower = remote(num_gpus=worker.gpu_share, concurrency_groups={"gang": 1}, **options)(actors.FollowerActor)
        service = remote(max_concurrency=_SERVICE_CALLS, **options)(actors.ServiceActor)
        given = (config, worker.log, worker.log_level, worker.gpu_share, worker.rank_weight_bytes)
        self._followers: list[Any] = [
            follower.options(name=f"{config.inbox}.rank{number}").remote(*given) for number in range(1, config.tp)
        ]
        self._rank: Any = rank.options(name=config.inbox).remote(*given, self._followers)
        self._service: Any = service.options(name=f"{config.inbox}.service").remote(
            config, worker.log, worker.log_level
        )
        self._runs = [one.run.remote() for one in (self._rank, *self._followers, self._service)]
        self._ready = self._service.wait_ready.remote()
        self._asked: Any = None
        self._progress = "starting"

    def poll(self) -> Death | None:
        import ray  # noqa: PLC0415

        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        deaths = [_death_of(one) for one in ended]
        # One's end soon is the others' too, and what a person must mend is told first.
        return next((death for death in deaths if death.hopeless), deaths[0] if deaths else None)

    def is_ready(self) -> bool:
        return _is_done(self._ready)

    def progress(self) -> str:
        """Asked for without waiting: what the last answer said."""
        import ray  # noqa: PLC0415

        if self.is_ready():
            return "ready"
        if self._asked is None:
            self._asked = self._service.progress.remote()
        elif _is_done(self._asked):
            with suppress(ray.exceptions.RayError):  # poll tells of the death
                self._progress = ray.get(self._asked)
            self._asked = None
        return self._progress

    def stop(self, grace_s: float) -> None:
        import ray  # noqa: PLC0415

        with suppress(ray.exceptions.RayError):
            self._service.stop.remote()
            ray.wait(self._runs, num_returns=len(self._runs), timeout=grace_s + _STOP_S)
        self.kill()

    def kill(self) -> None:
        import ray  # noqa: PLC0415

        for actor in (self._rank, *self._followers, self._service):
            with suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor, no_restart=True)
        self._worker.remove_rings(self._epoch)


def _is_done(ref: Any) -> bool:
    """True when it has an answer. An error is poll's to tell."""
    import ray  # noqa: PLC0415

    done, _ = ray.wait([ref], timeout=0)
    if not done:
        return False
    try:
        ray.get(ref)
    except ray.exceptions.RayError:
        return False
    return True


def _death_of(run: Any) -> Death:
    """run: of an actor that has ended."""
    import ray  # noqa: PLC0415

    try:
        ray.get(run)
    except ray.exceptions.RayTaskError as error:
        return _told(error.cause)
    except ray.exceptions.RayError as error:
        return Death(_first_line(error))
    return Death("it returned")


def _told(cause: BaseException) -> Death:
    """Configuration mistakes that only the rank could find would come again; anything else may not."""
    text = _first_line(cause)
    hopeless = isinstance(cause, ConfigError | ValueError | FileNotFoundError | MemoryError)
    if isinstance(cause, BatonError):
        return Death(text, hopeless)
    return Death(f"{type(cause).__name__}: {text}", hopeless)


def _first_line(error: BaseException) -> str:
    """Of what it says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
