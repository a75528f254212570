"""Open streams between ranks of one host, and the one thread of a rank that reads and writes them all.

A stream is a Unix domain socket: a file of mode 0600 in a folder that only its owner may enter, and both ends ask the
kernel whose process the other one is. It carries messages as encoding.py makes them; one that is damaged ends it, as
nothing behind it can be told apart any more. That a stream is closed is how a rank learns that a peer is gone.
"""

import logging
import os
import selectors
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import POLLERR, POLLHUP, POLLRDHUP, poll
from threading import Lock, Thread
from time import monotonic

from ..core.errors import TransferFailed
from .encoding import HEADER_BYTES, Damaged, Wire, decode, encode, length
from .inbox import Wakeup

_MOST_QUEUED = 8 << 20  # bytes for a peer that does not read
_HELLO_S = 10.0  # for who connected to say who it is
_ROOM_S = 0.01  # until a message that found no room is offered again
_ACCEPT_AGAIN_S = 0.2  # after an accept that failed: who waits stays in the queue, so that looking on would spin
_CHUNK = 1 << 18
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

_log = logging.getLogger(__name__)


class Stream:
    """One connection. Any thread may send; what comes is told by the thread of its `Streams`."""

    def __init__(self, file: socket.socket, changed: Callable[["Stream"], None]) -> None:
        self.owner: object = None  # whose it is, as who listens to it knows
        self.file = file
        self.came: bytearray = bytearray()
        self.held: Wire | None = None  # a message that is being told, or found no room
        self.watched = 0  # what its selector looks for
        self._changed = changed
        self._out: deque[bytes] = deque()
        self._queued = 0
        self._lock = Lock()
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Asks the kernel: a peer's death is seen at once, whatever else is still to be read."""
        with self._lock:
            if self._closed:
                return False
            asked = poll()
            asked.register(self.file, POLLRDHUP)
            return not any(found & (POLLRDHUP | POLLHUP | POLLERR) for _, found in asked.poll(0))

    def send(self, message: Wire) -> None:
        """Never blocks. Raises TransferFailed: it is closed, or the peer does not read."""
        data = encode(message)
        with self._lock:
            if self._closed:
                raise TransferFailed("the stream between the workers has closed")
            if self._queued + len(data) > _MOST_QUEUED:
                raise TransferFailed("the other worker does not read what it is told")
            if not self._out:  # nothing waits: this thread may go first
                data = data[self._write(data) :]
            if not data:
                return
            self._out.append(data)
            self._queued += len(data)
        self._changed(self)

    def flush(self) -> bool:
        """Write what waits, as far as it goes. True: nothing waits any more."""
        with self._lock:
            while self._out:
                done = self._write(self._out[0])
                self._queued -= done
                if done < len(self._out[0]):
                    self._out[0] = self._out[0][done:]
                    return False
                self._out.popleft()
            return True

    @property
    def waits(self) -> bool:
        """Something is still to be written."""
        return bool(self._out)

    def end(self) -> None:
        """Both ends learn that it is over. Again: nothing."""
        with self._lock:
            if not self._closed:
                with suppress(OSError):
                    self.file.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """The descriptor. For its `Streams` alone."""
        with self._lock:
            self._closed = True
            self._out.clear()
            self.file.close()

    def _write(self, data: bytes) -> int:
        """How much of it the kernel took. A broken stream takes all: who reads it learns of its end."""
        try:
            return self.file.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)


class Streams:
    """Listens at `path`, connects to others, and tells what comes."""

    def __init__(
        self,
        path: Path,
        heard: Callable[[Stream, Wire], bool],
        closed: Callable[[Stream], None],
    ) -> None:
        """Both are called by the thread of this object alone. heard: False asks to be told again, a little later.
        closed: once for each stream. Raises OSError where the socket can't be made."""
        self._path = path
        self._heard = heard
        self._told_closed = closed
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with _short_path(path) as name:
            self._listener.bind(name)
        os.chmod(path, 0o600)  # before anybody can connect
        self._listener.listen()
        self._wakeup = Wakeup()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup.fd, selectors.EVENT_READ)
        self._streams: set[Stream] = set()
        self._unknown: dict[Stream, float] = {}  # those that have not said who they are, and until when they must
        self._news: deque[Stream] = deque()
        self._accepts_at: float | None = None  # when to listen again; None: listens
        self._stopping = False
        self._thread = Thread(target=self._run, name="kv-streams", daemon=True)
        self._thread.start()

    def connect(self, path: str, hello: Wire, owner: object) -> Stream:
        """Raises OSError, PermissionError among them where another user listens there, and TransferFailed."""
        file = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            file.settimeout(_HELLO_S)
            with _short_path(Path(path)) as name:
                file.connect(name)
            _check_peer(file)
            file.setblocking(False)
        except BaseException:
            file.close()
            raise
        stream = Stream(file, self._changed)
        stream.owner = owner
        stream.send(hello)
        self._changed(stream)
        if self._stopping:  # looked at last: what `close` did not find among the news is closed here
            stream.close()
            raise TransferFailed("this rank's streams have ended")
        return stream

    def close(self) -> None:
        """Ends all streams and the thread. Nothing is told any more. The socket's file goes first: who finds a stream
        closed and the file gone knows that we left in good order."""
        self._path.unlink(missing_ok=True)
        self._stopping = True
        self._wakeup.ring()
        self._thread.join()
        for stream in self._all():
            stream.close()
        self._selector.close()
        self._listener.close()
        self._wakeup.close()

    def _changed(self, stream: Stream) -> None:
        """It is new, or something waits to be written."""
        self._news.append(stream)
        self._wakeup.ring()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception:
            _log.exception("this rank has no streams any more")
            self._give_up()

    def _turn(self) -> None:
        ready = self._selector.select(self._patience())
        if self._stopping:
            return
        if self._accepts_at is not None and monotonic() >= self._accepts_at:
            self._accepts_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        for key, events in ready:
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj == self._wakeup.fd:
                self._wakeup.clear()
            else:
                self._serve(key.data, events)
        while self._news:
            self._take_up(self._news.popleft())
        for stream in [stream for stream in self._streams if stream.held is not None]:
            self._tell(stream)
        for stream in [stream for stream, until in self._unknown.items() if monotonic() >= until]:
            self._drop(stream)

    def _give_up(self) -> None:
        """Nobody reads here any more, so nobody is to believe a stream open: both ends hear of the end of each."""
        self._stopping = True
        self._listener.close()
        for stream in self._all():
            stream.close()
            try:
                self._told_closed(stream)
            except Exception:  # of who listens: the others are told
                _log.exception("the end of a stream was not told")

    def _all(self) -> set[Stream]:
        """Every stream that is open; none is known any more after it."""
        found, self._streams = self._streams, set()
        while self._news:
            found.add(self._news.popleft())
        return found

    def _patience(self) -> float | None:
        waits = [_ROOM_S] if any(stream.held is not None for stream in self._streams) else []
        ends = [*self._unknown.values(), *([] if self._accepts_at is None else [self._accepts_at])]
        waits += [max(0.0, until - monotonic()) for until in ends]
        return min(waits, default=None)

    def _accept(self) -> None:
        try:
            file, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptor or no memory left
            _log.warning("no stream is taken for a while: %s", error)
            self._selector.unregister(self._listener)
            self._accepts_at = monotonic() + _ACCEPT_AGAIN_S
            return
        try:
            _check_peer(file)
            file.setblocking(False)
        except OSError as error:
            _log.warning("a stream is not taken: %s", error)
            file.close()
            return
        stream = Stream(file, self._changed)
        self._unknown[stream] = monotonic() + _HELLO_S
        self._take_up(stream)

    def _take_up(self, stream: Stream) -> None:
        """Look for what it needs: to be read unless a message is held, and written where something waits."""
        if stream.file.fileno() < 0:
            return  # closed meanwhile
        self._streams.add(stream)
        events = selectors.EVENT_READ * (stream.held is None) | selectors.EVENT_WRITE * stream.waits
        if events == stream.watched:
            return
        if stream.watched:
            self._selector.unregister(stream.file)
            stream.watched = 0
        if events:
            try:
                self._selector.register(stream.file, events, stream)
            except OSError as error:  # the kernel has no room for it
                _log.warning("a stream between workers ends: %s", error)
                self._drop(stream)
                return
        stream.watched = events

    def _serve(self, stream: Stream, events: int) -> None:
        if events & selectors.EVENT_WRITE and stream in self._streams and stream.flush():
            self._take_up(stream)
        if events & selectors.EVENT_READ and stream in self._streams:
            self._read(stream)

    def _read(self, stream: Stream) -> None:
        try:
            data = stream.file.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(stream)
            return
        stream.came += data
        self._tell(stream)

    def _tell(self, stream: Stream) -> None:
        """Every message that is there as a whole, until one finds no room."""
        try:
            while stream.held is not None or self._next(stream):
                assert stream.held is not None
                if not self._heard(stream, stream.held):
                    break
                stream.held = None
                if stream.owner is not None:
                    self._unknown.pop(stream, None)
        except Damaged as error:
            _log.warning("a stream between workers ends: %s", error)
            self._drop(stream)
        except Exception:  # of who listens: the other streams go on
            _log.exception("a stream between workers ends")
            self._drop(stream)
        else:
            self._take_up(stream)

    @staticmethod
    def _next(stream: Stream) -> bool:
        """Take the next message apart, if it is there as a whole. Raises Damaged."""
        size = length(stream.came[:HEADER_BYTES])
        if size is None or size > len(stream.came):
            return False
        stream.held = decode(bytes(stream.came[:size]))
        del stream.came[:size]
        return True

    def _drop(self, stream: Stream) -> None:
        if stream not in self._streams:
            return
        self._streams.discard(stream)
        self._unknown.pop(stream, None)
        if stream.watched:
            self._selector.unregister(stream.file)
        stream.close()
        self._told_closed(stream)  # an error of its is the end of all: see `_run`


@contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """The kernel takes 107 bytes of a socket's path; by way of its folder's descriptor any is short enough."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _check_peer(file: socket.socket) -> None:
    """Raises PermissionError unless the same user is at the other end."""
    credentials = file.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.geteuid():
        raise PermissionError(f"a process of user {user} is at the other end of a stream between workers")
