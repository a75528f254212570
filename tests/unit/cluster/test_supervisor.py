from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.cluster.supervisor import Death, State, Supervisor
from baton.core.errors import ConfigError
from baton.core.ids import Epoch


@dataclass
class FakeGang:
    epoch: Epoch
    death: Death | None = None
    ready: bool = False
    calls: list[str] = field(default_factory=list)

    def poll(self) -> Death | None:
        return self.death

    def is_ready(self) -> bool:
        return self.ready

    def progress(self) -> str:
        return "loading"

    def stop(self, grace_s: float) -> None:
        self.calls.append("stop")

    def kill(self) -> None:
        self.calls.append("kill")


class Stage:
    """A supervisor with a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self.gangs: list[FakeGang] = []
        self.told: list[str] = []
        self.epoch = 0
        self.supervisor = Supervisor("decode-0", self._start, self._next, lambda: self.now, self.told.append)

    def _start(self, epoch: Epoch) -> FakeGang:
        self.gangs.append(FakeGang(epoch))
        return self.gangs[-1]

    def _next(self) -> Epoch:
        self.epoch += 1
        return Epoch(self.epoch)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.supervisor.tick()


def test_a_death_ends_the_whole_gang_and_a_new_epoch_starts_after_a_pause() -> None:
    stage = Stage()
    stage.gangs[0].ready = True
    stage.supervisor.tick()
    assert stage.supervisor.state is State.READY
    stage.gangs[0].death = Death("killed")
    stage.supervisor.tick()
    assert stage.gangs[0].calls == ["kill"]
    assert stage.supervisor.state is State.WAITING
    assert len(stage.gangs) == 1
    stage.pass_time(1.0)
    assert [gang.epoch for gang in stage.gangs] == [1, 2]
    assert stage.supervisor.state is State.STARTING


def test_it_gives_up_after_some_deaths_in_a_row() -> None:
    stage = Stage()
    for _ in range(20):
        stage.gangs[-1].death = Death("killed")
        stage.supervisor.tick()
        stage.pass_time(60)
    assert stage.supervisor.state is State.GIVEN_UP
    assert len(stage.gangs) == 5
    assert "given up: killed" in stage.told[-1]


def test_a_long_life_forgives_the_deaths_before_it() -> None:
    stage = Stage()
    for _ in range(20):
        stage.gangs[-1].ready = True
        stage.supervisor.tick()
        stage.pass_time(120)
        stage.gangs[-1].death = Death("killed")
        stage.supervisor.tick()
        stage.pass_time(1)
    assert len(stage.gangs) == 21


def test_a_mistake_in_the_configuration_is_raised_at_once_but_not_after_it_ran() -> None:
    stage = Stage()
    stage.gangs[0].death = Death("unsupported model", hopeless=True)
    with pytest.raises(ConfigError, match="unsupported model"):
        stage.supervisor.tick()
    assert stage.gangs[0].calls == ["kill"]
    stage = Stage()
    stage.gangs[0].ready = True
    stage.supervisor.tick()
    stage.gangs[0].death = Death("file is gone", hopeless=True)
    stage.supervisor.tick()
    assert stage.supervisor.state is State.WAITING


class Lives(RuleBasedStateMachine):
    """Whatever happens: at most one gang lives, and each has an epoch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.stage.pass_time(seconds)

    @rule()
    def it_becomes_ready(self) -> None:
        self.stage.gangs[-1].ready = True
        self.stage.supervisor.tick()

    @rule()
    def it_dies(self) -> None:
        self.stage.gangs[-1].death = Death("killed")
        self.stage.supervisor.tick()

    @rule()
    def it_is_stopped(self) -> None:
        self.stage.supervisor.stop(1)

    @invariant()
    def at_most_one_gang_lives(self) -> None:
        assert all(gang.calls for gang in self.stage.gangs[:-1])
        assert len({gang.epoch for gang in self.stage.gangs}) == len(self.stage.gangs)


TestLives = Lives.TestCase
