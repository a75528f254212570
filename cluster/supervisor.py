"""Keeps one worker alive. A worker is a gang: when any of its actors dies all of them end, and what starts again is a
new epoch. Decides only; `Gang` does the starting and the killing, so that this runs in a test without Ray."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from ..core.errors import ConfigError
from ..core.ids import Epoch

_FIRST_DELAY_S = 1.0
_MOST_DELAY_S = 30.0
_TRIES = 5
_STEADY_S = 60.0  # a life this long forgives the deaths before it


@dataclass(frozen=True, slots=True)
class Death:
    """Why a gang is no more."""

    reason: str
    hopeless: bool = False  # the next life would end the same way: a person mends the configuration


class Gang(Protocol):
    """One life of a worker. `kill` may be called at any time and twice; after it nothing of that life is left."""

    def poll(self) -> Death | None: ...

    def is_ready(self) -> bool: ...

    def progress(self) -> str:
        """What it is doing now, in a few words."""
        ...

    def stop(self, grace_s: float) -> None:
        """Finish what runs within `grace_s`, then kill."""
        ...

    def kill(self) -> None: ...


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    GIVEN_UP = "given up"


class Supervisor:
    """Call `tick` a few times a second; it never blocks."""

    def __init__(
        self,
        name: str,
        start: Callable[[Epoch], Gang],
        next_epoch: Callable[[], Epoch],
        clock: Callable[[], float],
        tell: Callable[[str], None],
    ) -> None:
        self.name = name
        self.state = State.STARTING
        self._start = start
        self._next_epoch = next_epoch
        self._clock = clock
        self._tell = tell
        self._failures = 0
        self._was_ready = False
        self._since = clock()
        self._retry_at = 0.0
        self._gang: Gang | None = start(next_epoch())

    @property
    def progress(self) -> str:
        return self._gang.progress() if self._gang is not None else self.state.value

    def tick(self) -> None:
        """Look at the gang and act. Raises ConfigError for a death before the first readiness that would repeat."""
        if self._gang is not None:
            death = self._gang.poll()
            if death is not None:
                self._bury(self._gang, death)
            elif self.state is State.STARTING and self._gang.is_ready():
                self.state = State.READY
                self._was_ready = True
                self._since = self._clock()
        elif self.state is State.WAITING and self._clock() >= self._retry_at:
            self.state = State.STARTING
            self._since = self._clock()
            self._gang = self._start(self._next_epoch())

    def stop(self, grace_s: float) -> None:
        gang, self._gang = self._gang, None
        self.state = State.GIVEN_UP
        if gang is not None:
            gang.stop(grace_s)

    def _bury(self, gang: Gang, death: Death) -> None:
        gang.kill()
        self._gang = None
        if death.hopeless and not self._was_ready:
            self.state = State.GIVEN_UP
            raise ConfigError(death.reason)
        if self.state is State.READY and self._clock() - self._since >= _STEADY_S:
            self._failures = 0
        self._failures += 1
        if self._failures >= _TRIES:
            self.state = State.GIVEN_UP
            self._tell(f"{self.name} ended {self._failures} times and is given up: {death.reason}")
            return
        delay_s = min(_MOST_DELAY_S, _FIRST_DELAY_S * 2 ** (self._failures - 1))
        self.state = State.WAITING
        self._retry_at = self._clock() + delay_s
        self._tell(f"{self.name} ended ({death.reason}); it starts again in {delay_s:.0f} s")
