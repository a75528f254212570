"""A ring of bytes in shared memory between two processes of one host: one writes, one reads.

    offset 0     64     128    192        256                     256 + capacity
           head | tail | pid  | capacity | records ...           |
           (reader)(writer)(of the writer)

head and tail count bytes since the start and never turn back, so `tail - head` is what waits. A record is a u32 length
and its payload, wrapping around the end. Each counter has one writer and is one aligned 8-byte word, stored after the
bytes it speaks of were, and read before they are. x86-64 keeps that order for the other process, ARM only across a
fence.

The doorbell is a FIFO beside the file: the writer puts a byte in after each record, the reader sleeps on it
(poll, epoll, an asyncio loop), so nobody polls. Both files have mode 0600.
"""

import mmap
import os
import struct
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

_HEAD, _TAIL, _PID, _CAPACITY, _DATA = 0, 64, 128, 192, 256
_WORD = 8
_LENGTH = struct.Struct("<I")
DEFAULT_CAPACITY = 8 << 20


class RingFull(Exception):
    """The record does not fit now. Nothing was written."""


class Ring:
    """One direction. `create` it in one process, `open` it in the other; each then only writes or only reads."""

    def __init__(self, path: Path, shared: mmap.mmap, bell: int) -> None:
        self._path = path
        self._shared = shared
        self._bytes = memoryview(shared)
        self._head = self._bytes[_HEAD : _HEAD + _WORD].cast("Q")
        self._tail = self._bytes[_TAIL : _TAIL + _WORD].cast("Q")
        self._pid = self._bytes[_PID : _PID + _WORD].cast("Q")
        self._capacity = int(self._bytes[_CAPACITY : _CAPACITY + _WORD].cast("Q")[0])
        self._bell = bell
        self._lock = Lock()
        self._lock.acquire()

    @classmethod
    def create(cls, path: Path, capacity: int = DEFAULT_CAPACITY, *, writer: bool = True) -> Self:
        """`writer`: this process will write. Raises FileExistsError: a name is for one life of a worker."""
        os.mkfifo(_bell_path(path), 0o600)
        # Made under another name first: who can open `path` finds it whole.
        half = path.with_name(path.name + ".half")
        file = os.open(half, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.truncate(file, _DATA + capacity)
        os.pwrite(file, struct.pack("=Q", capacity), _CAPACITY)
        os.pwrite(file, struct.pack("=Q", os.getpid() if writer else 0), _PID)
        ring = cls._of(path, file)  # opened before it is seen: the peer removes the names as soon as it has opened them
        os.link(half, path)
        os.unlink(half)
        return ring

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises FileNotFoundError before `create` has finished."""
        return cls._of(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))

    @classmethod
    def _of(cls, path: Path, file: int) -> Self:
        """Takes over the descriptor `file`."""
        try:
            shared = mmap.mmap(file, os.fstat(file).st_size)
        finally:
            os.close(file)
        # Read and write, so that neither opening nor a peer's death ever blocks or ends the FIFO.
        bell = os.open(_bell_path(path), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        return cls(path, shared, bell)

    @property
    def fd(self) -> int:
        """The doorbell's descriptor, readable while records may wait."""
        return self._bell

    @property
    def capacity(self) -> int:
        """Bytes for records, lengths included."""
        return self._capacity

    @property
    def writer_pid(self) -> int:
        """Which process writes, so that the reader can watch it live; 0 while it is not known."""
        return int(self._pid[0])

    def put(self, *parts: bytes) -> None:
        """Write one record, the parts in a row. Never blocks. Raises RingFull."""
        size = sum(map(len, parts))
        tail = self._tail[0]
        if tail + _LENGTH.size + size - self._head[0] > self._capacity:
            raise RingFull(f"{size} bytes do not fit the ring now")
        at = self._write(tail, _LENGTH.pack(size))
        for part in parts:
            at = self._write(at, part)
        self._fence()
        self._tail[0] = at
        with suppress(BlockingIOError):  # a full FIFO rings already
            os.write(self._bell, b"\0")

    def take(self) -> list[bytes]:
        """Every record that waits, oldest first. Clears the doorbell."""
        with suppress(BlockingIOError):
            while len(os.read(self._bell, 4096)) == 4096:
                pass
        head, tail = self._head[0], self._tail[0]
        self._fence()
        records: list[bytes] = []
        while head < tail:
            (size,) = _LENGTH.unpack(self._read(head, _LENGTH.size))
            records.append(self._read(head + _LENGTH.size, size))
            head += _LENGTH.size + size
        self._fence()
        self._head[0] = head
        return records

    def close(self) -> None:
        """The mapping and the doorbell of this process. The files stay until `unlink`."""
        for view in (self._head, self._tail, self._pid, self._bytes):
            view.release()
        self._shared.close()
        os.close(self._bell)

    def unlink(self) -> None:
        self._path.unlink(missing_ok=True)
        _bell_path(self._path).unlink(missing_ok=True)

    def _fence(self) -> None:
        """What comes before is done, for other processes too, before what comes after. Python has no fence of its own:
        giving a lock back and taking it again is a store-release and then a load-acquire, which together are one."""
        self._lock.release()
        self._lock.acquire()

    def _write(self, at: int, data: bytes) -> int:
        start = at % self._capacity
        first = min(len(data), self._capacity - start)
        self._bytes[_DATA + start : _DATA + start + first] = data[:first]
        self._bytes[_DATA : _DATA + len(data) - first] = data[first:]
        return at + len(data)

    def _read(self, at: int, size: int) -> bytes:
        start = at % self._capacity
        first = min(size, self._capacity - start)
        data = bytes(self._bytes[_DATA + start : _DATA + start + first])
        return data if first == size else data + bytes(self._bytes[_DATA : _DATA + size - first])


class RingPair:
    """Both directions between a service and its rank, seen from one end."""

    def __init__(self, outgoing: Ring, incoming: Ring) -> None:
        self.outgoing = outgoing
        self.incoming = incoming

    @classmethod
    def for_rank(cls, folder: Path, name: str, capacity: int = DEFAULT_CAPACITY) -> Self:
        """The rank's end. Makes the files, in a folder that only its owner may enter. Raises PermissionError when it is
        there and others may write to it: they could put files of theirs in the place of ours."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{folder} may be written to by others; remove it, or choose another ring_dir")
        incoming = Ring.create(folder / f"{name}.to_rank", capacity, writer=False)
        return cls(Ring.create(folder / f"{name}.from_rank", capacity), incoming)  # last: the service waits for it

    @classmethod
    def for_service(cls, folder: Path, name: str) -> Self:
        """The service's end. Raises FileNotFoundError until the rank has made it."""
        incoming = Ring.open(folder / f"{name}.from_rank")
        return cls(Ring.open(folder / f"{name}.to_rank"), incoming)

    def close(self) -> None:
        self.outgoing.close()
        self.incoming.close()

    def unlink(self) -> None:
        self.outgoing.unlink()
        self.incoming.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _bell_path(path: Path) -> Path:
    return path.with_name(path.name + ".bell")
