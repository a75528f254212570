"""Processes that `baton serve` starts, and the sweep that leaves none behind."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Runs before the command, in its process: asks the kernel to end it should we die. A preexec_fn would run Python
# between fork and exec, which may lock up once Ray has threads here.
_TETHER = (
    "import ctypes, os, signal, sys; "
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(slots=True)
class Child:
    """A process of ours in its own session, so that a Ctrl-C in the terminal reaches only us."""

    name: str
    log: Path
    _process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        stdout: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> "Child":
        """Start `command`, an absolute path and its arguments; what it says goes to `log`, or `stdout` for that one.

        Call it from the main thread: the kernel ties the child to the thread that made it.
        """
        tether = [sys.executable, "-S", "-E", "-c", _TETHER, str(os.getpid()), *command]
        with log.open("ab") as err, (stdout or log).open("ab") as out:
            process = subprocess.Popen(  # noqa: S603  # a fixed command
                tether, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, start_new_session=True
            )
        return cls(name, log, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self, timeout_s: float) -> bool:
        """False: it still ran after so many seconds, and was killed."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
        return True

    def last_lines(self, count: int) -> str:
        """The end of its log in one line, for an error message."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return " | ".join(line.strip() for line in lines[-count:] if line.strip())


def adopt_orphans() -> None:
    """Make descendants whose parent ends ours, so that `sweep` finds every process that came from this one."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Processes below `root`, parents first. Linux only: reads /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):  # it ended meanwhile
                # "pid (name) state ppid ...": the name may hold anything, also ")"
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, front = [], [root]
    while front:
        front = [child for parent in front for child in children.get(parent, [])]
        found += front
    return found


def sweep(grace_s: float) -> int:
    """End every process below ours: ask, wait up to `grace_s` (0: do neither), kill. Gives how many were killed."""
    if grace_s:
        for pid in descendants(os.getpid()):
            _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and _reap_and_list():
        time.sleep(0.05)
    killed: set[int] = set()
    while left := _reap_and_list():  # a killed parent's children become ours: until none is left
        for pid in left:
            _signal(pid, signal.SIGKILL)
        killed.update(left)
        time.sleep(0.01)
    return len(killed)


def _reap_and_list() -> list[int]:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return descendants(os.getpid())


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
