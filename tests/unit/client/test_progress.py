import io

from baton.client.progress import ProgressLine, render


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(Terminal):
    def write(self, text: str) -> int:
        raise BrokenPipeError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_line_tells_requests_tokens_and_time() -> None:
    assert render(5, 20, 9000, 450, 65.0) == "[#####...............] 5/20 requests, tokens/s in 138 out 7, 1:05"
    assert render(0, 20, 0, 0, 0.0).startswith("[....................] 0/20 requests, tokens/s in 0 out 0, 0:00")
    assert render(20, 20, 1, 1, 1.0).startswith("[####################] 20/20")


def test_it_is_rewritten_in_place_a_few_times_a_second_and_stays_at_the_end() -> None:
    terminal, clock = Terminal(), Clock()
    with ProgressLine(4, stream=terminal, clock=clock) as line:
        for _ in range(100):
            clock.now += 0.01
            line.add(tokens_out=1)
        line.add(done=4, tokens_in=50)
    drawn = terminal.getvalue().split("\r\x1b[2K")[1:]
    assert 10 <= len(drawn) <= 12
    assert "0/4 requests" in drawn[0]
    assert drawn[-1] == "[####################] 4/4 requests, tokens/s in 50 out 100, 0:01\n"


def test_nothing_is_written_off_a_terminal_or_when_it_is_not_wanted() -> None:
    file, terminal = io.StringIO(), Terminal()
    for stream, shown in ((file, True), (terminal, False)):
        with ProgressLine(1, shown=shown, stream=stream) as line:
            line.add(done=1)
        assert stream.getvalue() == ""


def test_a_terminal_that_was_closed_stops_nothing() -> None:
    with ProgressLine(1, stream=Closed()) as line:
        line.add(done=1)
