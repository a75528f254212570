"""A list of requests over a fake model: in what order it is read, how it ends, and what Ctrl-C leaves."""

import signal
import threading
from collections.abc import Iterator

import pytest

from baton.core.errors import Unavailable
from baton.core.ids import SequenceId
from baton.core.request import Request, Sampling
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.offline import HeldInterrupts, Offline
from baton.engine.policies import policy
from baton.engine.sequence import Sequence
from baton.engine.step_result import StepResult

from ...fakes import answer, fake_engine


def offline(max_batch: int = 2) -> Offline:
    engine = fake_engine(max_batch=max_batch)
    return Offline(engine, ContinuousBatch(engine, policy("fcfs")))


def request(index: int, count: int = 5) -> Request:
    prompt = tuple((index * 7 + at) % 97 for at in range(20 + index))
    return Request(
        sequence_id=SequenceId(f"{index}/0"), prompt=prompt, sampling=Sampling(max_tokens=count, temperature=0.0)
    )


def check_clean(made: Offline) -> None:
    made.engine.ledger.check()
    assert made.engine.ledger.held_count == 0


def test_every_request_runs_to_its_end() -> None:
    made, tokens, ended = offline(), dict[str, list[int]](), list[str]()

    def on_step(result: StepResult) -> list[Sequence]:
        for seq, token, _ in result.tokens:
            tokens.setdefault(seq.sequence_id, []).append(token)
        ended.extend(seq.sequence_id for seq, _ in result.ended)
        return []

    requests = [request(index) for index in range(30)]
    made.run(requests, on_step)
    assert sorted(ended) == sorted(one.sequence_id for one in requests)
    assert tokens == {one.sequence_id: answer(one.prompt, 5) for one in requests}
    check_clean(made)


def test_requests_are_read_only_as_there_is_room() -> None:
    made, read = offline(max_batch=2), 0

    def requests() -> Iterator[Request]:
        nonlocal read
        for index in range(50):
            read += 1
            yield request(index, count=3)

    most, ended = 0, 0

    def on_step(result: StepResult) -> list[Sequence]:
        nonlocal most, ended
        most = max(most, read - ended)
        ended += len(result.ended)
        return []

    made.run(requests(), on_step)
    assert (read, ended) == (50, 50)
    assert most <= 8


def test_nothing_to_run_is_no_step() -> None:
    made = offline()
    made.run([], lambda result: pytest.fail("a step of nothing"))


def test_a_sequence_that_is_ended_early_gives_its_blocks_back_and_nothing_more() -> None:
    made, seen = offline(), list[int]()

    def on_step(result: StepResult) -> list[Sequence]:
        seen.extend(token for _, token, _ in result.tokens)
        return [seq for seq, _, _ in result.tokens if len(seq.tokens) == 2]

    made.run([request(0, count=100)], on_step)
    assert seen[:2] == answer(request(0).prompt, 2)
    assert len(seen) == 2
    check_clean(made)


def test_an_error_of_the_caller_leaves_everything_clean() -> None:
    made = offline()

    def on_step(result: StepResult) -> list[Sequence]:
        if len(result.ended):
            raise KeyError("mine")
        return []

    with pytest.raises(KeyError):
        made.run([request(index) for index in range(9)], on_step)
    check_clean(made)
    made.run([request(1)], lambda result: [])


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Raises, as Python has it; whoever started the tests may have it ignored, as shells do for what runs behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_step_to_end_and_leaves_everything_clean() -> None:
    made, steps = offline(), 0

    def on_step(result: StepResult) -> list[Sequence]:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGINT)
        return []

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        made.run([request(index, count=50) for index in range(9)], on_step)
    assert steps == 3
    assert signal.getsignal(signal.SIGINT) is before
    check_clean(made)
    made.run([request(1)], lambda result: [])


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_ctrl_c_does_not_wait() -> None:
    with HeldInterrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.let_through()


def test_a_step_that_broke_leaves_an_engine_that_says_so() -> None:
    class Breaks(ContinuousBatch):
        def step(self, now: float) -> StepResult | None:
            raise MemoryError

    engine = fake_engine()
    made = Offline(engine, Breaks(engine, policy("fcfs")))
    with pytest.raises(MemoryError):
        made.run([request(0)], lambda result: [])
    with pytest.raises(Unavailable, match="load the model again"):
        made.run([request(0)], lambda result: [])


def test_elsewhere_than_on_the_main_thread_signals_are_left_alone() -> None:
    made, errors = offline(), list[BaseException]()

    def run() -> None:
        try:
            made.run([request(0)], lambda result: [])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert errors == []
    check_clean(made)
