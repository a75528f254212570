"""`baton serve`: starts Redis, Ray, the router and the workers, watches them, and ends them.

    main thread:  check -> Redis, router, Ray -> gangs -> wait until ready -> watch ... signal -> drain -> sweep

Redis and the router start while Ray does; the workers of all gangs start at once.
"""

import fcntl
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from ..core.errors import ConfigError
from ..core.ids import Epoch
from ..text.model_source import is_local, resolve
from . import children, preflight, redis
from .children import Child
from .config import ServeConfig, read_api_keys
from .plan import ClusterPlan, plan_cluster
from .router_process import RouterProcess
from .screen import Screen, banner
from .supervisor import State, Supervisor
from .tail import Tail

_TICK_S = 0.1
_SWEEP_S = 5.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # a folder of ours with mode 0700 is made in it
_PREFIX = "baton-"
_ASK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last one comes when the terminal is closed
_ALIVE = "alive"  # a file of the run's folder, locked as long as its `baton serve` lives
_SOCKET_PATH_MOST = 40  # of the run's folder: Ray's sockets lie 65 characters deeper, the kernel takes 107


class Interrupted(BaseException):
    """A signal asked us to end. No `Exception`: it passes through whatever code runs when the signal comes."""


@dataclass(frozen=True, slots=True)
class Folders:
    """Of one run, both 0700 and removed at its end."""

    run: Path  # sockets, Ray's session
    logs: Path  # inside it; what is written there shows on standard error
    rings: Path  # in shared memory


def serve(config: ServeConfig) -> int:
    """Run a cluster until a signal. 0: ended as asked. Raises ConfigError for whatever a person can mend."""
    screen = Screen(as_json=config.log_format == "json")
    started = time.monotonic()
    preflight.check_installed()
    preflight.check_ports(config)
    if config.redis_url is not None:
        redis.ping(config.redis_url)
    api_keys = read_api_keys(config)
    if not api_keys and os.environ.get("BATON_API_KEY"):
        screen.notice(
            "BATON_API_KEY is what a client sends; this cluster asks for no key: set BATON_API_KEYS if it shall."
        )
    if not is_local(config.model):
        screen.say(f"Fetching {config.model} from the hub, unless it is here already.")
    plan = plan_cluster(config, resolve(config.model), api_keys, config.cluster_token or secrets.token_hex(32))
    signals = Signals()
    children.adopt_orphans()
    with signals, _folders() as folders, Tail(folders.logs, aside=screen.aside):
        run = Run(plan, folders, screen, signals)
        try:
            with signals.raising():
                run.start()
            screen.say(banner(config, plan.model_name, keys=bool(api_keys)))
            screen.say(f"  Ready after {time.monotonic() - started:.0f} s.")
            run.watch()
        except Interrupted:
            if not run.started:  # nobody can have asked for anything: nothing to wait for
                screen.notice("Ending: every process that was started is ended.")
                _end_at_once(folders, 0)()
            screen.notice(f"Ending: running requests have up to {config.drain_s} s; Ctrl-C again ends it now.")
        finally:
            signals.now = _end_at_once(folders, 130)
            run.end()
    return 0


class Run:
    """One cluster's processes."""

    def __init__(self, plan: ClusterPlan, folders: Folders, screen: Screen, signals: "Signals") -> None:
        self._plan = plan
        self._folders = folders
        self._screen = screen
        self._signals = signals
        self._redis: Child | None = None
        self._router: RouterProcess | None = None
        self._supervisors: list[Supervisor] = []
        self._epoch = time.time_ns() // 1_000_000
        self.started = False

    def start(self) -> None:
        """Until the router says that it is ready. Raises ConfigError or Interrupted."""
        deadline = time.monotonic() + self._plan.config.start_s
        redis_url = self._plan.config.redis_url
        if redis_url is None:
            self._screen.progress("Starting Redis")
            self._redis, redis_url = redis.start_private(self._folders.run)
            redis.wait_for(self._redis, redis_url)
        self._screen.progress("Starting the router and Ray")
        self._router = RouterProcess(self._plan.router(redis_url), self._folders.logs / "router.log")
        from . import local_ray  # noqa: PLC0415  # half a second, while the router starts

        local_ray.start(self._plan.num_gpus, self._plan.cluster_token, self._folders.run / "ray")
        self._signals.install()  # whatever Ray has put in their place
        self._signals.check()
        for worker in self._plan.workers(redis_url, self._folders.rings, self._folders.logs):
            start_gang = partial(local_ray.RayGang, worker)
            self._supervisors.append(
                Supervisor(worker.worker_id, start_gang, self._next_epoch, time.monotonic, self._screen.notice)
            )
        while not self._is_ready():
            self._tick()
            if time.monotonic() > deadline:
                state = ", ".join(f"{supervisor.name} {supervisor.progress}" for supervisor in self._supervisors)
                raise ConfigError(
                    f"Not ready after {self._plan.config.start_s} s ({state}; router: {self._router.last_lines()}): "
                    "give --start-s more if the model is large."
                )
            self._screen.progress("; ".join(f"{one.name} {one.progress}" for one in self._supervisors))
        self.started = True

    def watch(self) -> None:
        """Until a signal. Raises Interrupted, or ConfigError when nothing that could serve is left."""
        while True:
            self._tick()
            if all(supervisor.state is State.GIVEN_UP for supervisor in self._supervisors):
                raise ConfigError("Every worker has been given up: its log above says why.")

    def end(self) -> None:
        """Drain within the bound, then end everything."""
        drain_s = self._plan.config.drain_s
        deadline = time.monotonic() + drain_s
        if self._router is not None:
            self._router.stop(drain_s)
        for supervisor in self._supervisors:
            with suppress(Exception):  # Ray may be gone; the sweep ends what is left
                supervisor.stop(max(0.5, deadline - time.monotonic()))
        if self._supervisors:
            from . import local_ray  # noqa: PLC0415  # loaded since start

            local_ray.stop()
        if self._redis is not None:
            self._redis.terminate()
            self._redis.wait(_SWEEP_S)
        children.sweep(_SWEEP_S)

    def _is_ready(self) -> bool:
        workers = all(supervisor.state is State.READY for supervisor in self._supervisors)
        return workers and self._router is not None and self._router.is_ready()

    def _tick(self) -> None:
        self._signals.check()
        if self._redis is not None and self._redis.poll() is not None:
            raise ConfigError(f"The private Redis ended: {self._redis.last_lines(3)}.")
        if self._router is not None:
            self._router.tick(self._screen.notice)
        for supervisor in self._supervisors:
            supervisor.tick()
        time.sleep(_TICK_S)

    def _next_epoch(self) -> Epoch:
        self._epoch += 1
        return Epoch(self._epoch)


class Signals:
    """The first Ctrl-C, SIGTERM or SIGHUP asks for an orderly end, the second one ends at once."""

    def __init__(self) -> None:
        self._asked = False
        self._raises = False
        self._pid = os.getpid()
        self._before: dict[signal.Signals, object] = {}
        self.now: Callable[[], None] | None = None  # what the second one does, once the end has begun

    def __enter__(self) -> "Signals":
        self._before = {number: signal.getsignal(number) for number in _ASK}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what getsignal gave

    def install(self) -> None:
        for number in _ASK:
            if self._before[number] is not signal.SIG_IGN or number is not signal.SIGHUP:  # `nohup` is obeyed
                signal.signal(number, self._take)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Within it the first signal raises Interrupted wherever the main thread is."""
        self._raises = True
        before, sys.unraisablehook = sys.unraisablehook, self._again
        try:
            self.check()
            yield
        finally:
            self._raises = False
            sys.unraisablehook = before

    def check(self) -> None:
        """Raises Interrupted once a signal came."""
        if self._asked:
            raise Interrupted

    def _again(self, lost: "sys.UnraisableHookArgs") -> None:
        """A signal came within a callback that can't raise, such as one of a fork: it comes again a little later."""
        if not isinstance(lost.exc_value, Interrupted):
            sys.__unraisablehook__(lost)
            return
        self._asked = False
        threading.Timer(_TICK_S / 2, os.kill, (self._pid, signal.SIGTERM)).start()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # between fork and exec of a child
            return
        if self._asked and self.now is not None:
            self.now()
        first, self._asked = not self._asked, True
        if first and self._raises:
            raise Interrupted


@contextmanager
def _folders() -> Iterator[Folders]:
    base = Path(tempfile.gettempdir())
    if len(str(base)) >= _SOCKET_PATH_MOST - 16:
        base = Path("/tmp")  # noqa: S108
    _remove_orphans(base)
    folders = _folders_of(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base)))
    folders.logs.mkdir()
    folders.rings.mkdir(mode=0o700)
    with (folders.run / _ALIVE).open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)  # until this process ends, however it ends
        try:
            yield folders
        finally:
            _remove(folders)


def _folders_of(run: Path) -> Folders:
    shared = os.access(_SHARED_MEMORY, os.W_OK)
    return Folders(run, run / "logs", _SHARED_MEMORY / run.name if shared else run / "rings")


def _remove_orphans(base: Path) -> None:
    """Folders of runs that were killed before they could remove them: nobody holds their lock any more."""
    for lock in base.glob(f"{_PREFIX}*/{_ALIVE}"):
        with suppress(OSError), lock.open("rb") as alive:  # it runs, it is another user's, or just gone
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.parent.lstat().st_uid == os.geteuid():
                _remove(_folders_of(lock.parent))


def _remove(folders: Folders) -> None:
    for folder in (folders.rings, folders.run):
        shutil.rmtree(folder, ignore_errors=True)


def _end_at_once(folders: Folders, status: int) -> Callable[[], None]:
    def end() -> None:
        children.sweep(0)  # before the removal: who still runs would make its folder anew
        _remove(folders)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)  # threads of Ray may wait for what was just killed

    return end
