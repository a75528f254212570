"""Streams: what is sent arrives whole and in order, and nobody who sends ever waits."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest

from baton.core.errors import TransferFailed
from baton.core.ids import Epoch, SequenceId, TicketId
from baton.kv_transfer.encoding import Wire, encode
from baton.kv_transfer.messages import Hello, Returned
from baton.kv_transfer.streams import Stream, Streams

WAIT_S = 60.0
HELLO = Hello(b"sixteen bytes ..")


class Side:
    """Keeps what it hears, as long as there is room."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: SimpleQueue[tuple[Stream, Wire]] = SimpleQueue()
        self.closed: SimpleQueue[Stream] = SimpleQueue()
        self.room = threading.Event()
        self.room.set()
        self.streams = Streams(path, self._hear, self.closed.put)

    def _hear(self, stream: Stream, message: Wire) -> bool:
        if not self.room.is_set():
            return False
        if isinstance(message, Hello):
            stream.owner = "known"
        self.heard.put((stream, message))
        return True

    def next(self) -> Wire:
        return self.heard.get(timeout=WAIT_S)[1]


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    with ExitStack() as stack:
        # A path that is longer than a socket's may be.
        folder = tmp_path / ("long" * 30)
        folder.mkdir()
        found = Side(folder / "a.kv"), Side(folder / "b.kv")
        for side in found:
            stack.callback(side.streams.close)
        yield found


def message(number: int, text: str = "") -> Returned:
    said = Returned(ticket_id=TicketId(str(number)), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1))
    return replace(said, error_message=text)


def test_messages_arrive_in_order_both_ways_however_many(sides: tuple[Side, Side]) -> None:
    here, there = sides
    stream = here.streams.connect(str(there.path), HELLO, "peer")
    many = [message(number, "x" * 4000) for number in range(400)]  # more than a socket takes at once
    for one in many:
        stream.send(one)
    back, hello = there.heard.get(timeout=WAIT_S)
    assert hello == HELLO
    assert [there.next() for _ in many] == many
    back.send(message(7))
    assert here.next() == message(7)


def test_while_there_is_no_room_nothing_is_lost(sides: tuple[Side, Side]) -> None:
    here, there = sides
    there.room.clear()
    stream = here.streams.connect(str(there.path), HELLO, "peer")
    for number in range(5):
        stream.send(message(number))
    there.room.set()
    assert [there.next() for _ in range(6)] == [HELLO, *(message(number) for number in range(5))]


def test_a_peer_that_does_not_read_makes_sending_fail_and_never_wait(sides: tuple[Side, Side]) -> None:
    here, there = sides
    stream = here.streams.connect(str(there.path), HELLO, "peer")
    assert there.next() == HELLO
    there.room.clear()
    large = message(1, "x" * 4000)

    def send_16_mib() -> None:
        for _ in range((16 << 20) // len(encode(large))):
            stream.send(large)

    with pytest.raises(TransferFailed, match="does not read"):
        send_16_mib()


@pytest.mark.parametrize("who", ["here", "there"])
def test_when_either_end_closes_both_hear_of_it_once(sides: tuple[Side, Side], who: str) -> None:
    here, there = sides
    stream = here.streams.connect(str(there.path), HELLO, "peer")
    other, _ = there.heard.get(timeout=WAIT_S)
    assert stream.is_open
    assert other.is_open
    (stream if who == "here" else other).end()
    assert not stream.is_open
    assert not other.is_open
    assert here.closed.get(timeout=WAIT_S) is stream
    assert there.closed.get(timeout=WAIT_S) is other
    with pytest.raises(TransferFailed):
        stream.send(message(1))
    assert here.closed.empty()


def test_what_was_said_before_the_end_is_heard(sides: tuple[Side, Side]) -> None:
    here, there = sides
    stream = here.streams.connect(str(there.path), HELLO, "peer")
    stream.send(message(1))
    stream.end()
    there.closed.get(timeout=WAIT_S)
    assert [there.next(), there.next()] == [HELLO, message(1)]


def test_a_message_in_pieces_is_put_together_and_rubbish_ends_the_stream(sides: tuple[Side, Side]) -> None:
    _, there = sides
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(WAIT_S)
        _connect(raw, there.path)
        data = encode(HELLO) + encode(message(3))
        for at in range(len(data)):
            raw.sendall(data[at : at + 1])
        assert [there.next(), there.next()] == [HELLO, message(3)]
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert raw.recv(1) == b""
    there.closed.get(timeout=WAIT_S)


def test_only_its_owner_may_connect(sides: tuple[Side, Side]) -> None:
    _, there = sides
    assert there.path.stat().st_mode & 0o777 == 0o600
    there.streams.close()
    assert not there.path.exists()
    there.streams = Streams(there.path, lambda *_: True, there.closed.put)


def test_an_accept_that_fails_is_tried_again_and_the_other_streams_go_on(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = sides
    stream = here.streams.connect(str(there.path), HELLO, "peer")
    assert there.next() == HELLO
    plain, failed = socket.socket.accept, threading.Event()

    def has_no_descriptor_once(listener: socket.socket) -> tuple[socket.socket, object]:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EMFILE, "Too many open files")
        return plain(listener)

    monkeypatch.setattr("socket.socket.accept", has_no_descriptor_once)
    here.streams.connect(str(there.path), HELLO, "peer")
    assert failed.wait(WAIT_S)
    stream.send(message(1))
    assert [type(there.next()) for _ in range(2)].count(Hello) == 1, "who waited is taken, and the first is still read"


def test_when_the_thread_cannot_go_on_both_ends_hear_that_all_its_streams_have_ended(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = sides
    streams = [here.streams.connect(str(there.path), HELLO, "peer") for _ in range(2)]
    others = [there.heard.get(timeout=WAIT_S)[0] for _ in streams]

    def fails(_: Stream, __: int) -> None:
        raise MemoryError

    monkeypatch.setattr(there.streams, "_serve", fails)
    streams[0].send(message(1))
    assert {there.closed.get(timeout=WAIT_S) for _ in streams} == set(others)
    assert {here.closed.get(timeout=WAIT_S) for _ in streams} == set(streams)
    assert not any(stream.is_open for stream in (*streams, *others))
    assert "no streams any more" in caplog.text
    with pytest.raises(TransferFailed, match="have ended"):
        there.streams.connect(str(here.path), HELLO, "peer")
    with pytest.raises(ConnectionError):
        here.streams.connect(str(there.path), HELLO, "peer")


def test_who_does_not_say_who_it_is_in_time_is_dropped(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, there = sides
    monkeypatch.setattr("baton.kv_transfer.streams._HELLO_S", 0.0)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(WAIT_S)
        _connect(raw, there.path)
        assert raw.recv(1) == b""
    there.closed.get(timeout=WAIT_S)


def test_another_users_process_is_not_taken_at_either_end(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = sides
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)  # the kernel says who is really there
    with pytest.raises(PermissionError, match="of user"):
        here.streams.connect(str(there.path), HELLO, "peer")
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(WAIT_S)
        _connect(raw, there.path)
        assert raw.recv(1) == b""
    assert there.heard.empty()
    assert "of user" in caplog.text


def test_after_the_end_nothing_connects_and_the_sockets_file_is_gone(sides: tuple[Side, Side]) -> None:
    here, there = sides
    here.streams.close()
    with pytest.raises(TransferFailed, match="have ended"):
        here.streams.connect(str(there.path), HELLO, "peer")
    assert not here.path.exists()
    assert there.heard.get(timeout=WAIT_S)[1] == HELLO
    there.closed.get(timeout=WAIT_S)


def _connect(raw: socket.socket, path: Path) -> None:

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        raw.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
