"""Memory that processes of one host share. It has no name in any folder, so nothing stays behind, whoever dies.

A segment is an anonymous file (memfd) of the rank that made it. The others open it through that rank's entry in /proc,
which the kernel allows to processes of the same user; it is not bound by the size of /dev/shm, which containers keep
small. Once opened it outlives its maker; its size is sealed, so that nobody's mapping ever ends in the air. A doorbell
is a pipe that is opened the same way.

Order: a counter is one aligned 8-byte word with one writer, stored after the bytes it speaks of were (`Fence`), and
read before they are.
"""

import fcntl
import mmap
import os
from threading import Lock

WORD = 8
LINE = 64  # bytes of a cache line: words of different writers lie on different ones


class RankLost(Exception):
    """A rank that this one shares memory with died, or did not come to a meeting in time."""


class Segment:
    """Zeros at first. Mapped for as long as anything refers to `shared`: a view, or a tensor over it."""

    def __init__(self, file: int, address: str, *, writable: bool = True) -> None:
        """Takes over the descriptor."""
        self._file = file
        self.address = address  # for `open`, on this host, while the maker has not closed it
        access = mmap.ACCESS_DEFAULT if writable else mmap.ACCESS_READ
        self.shared = mmap.mmap(file, os.fstat(file).st_size, access=access)

    @classmethod
    def create(cls, num_bytes: int) -> "Segment":
        file = os.memfd_create("baton", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(file, 0o600)  # it begins as 0777
        os.truncate(file, num_bytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(file, _address(file))

    @classmethod
    def open(cls, address: str, *, writable: bool = True) -> "Segment":
        """Raises RankLost where its maker is gone."""
        return cls(_open(address, os.O_RDWR if writable else os.O_RDONLY), address, writable=writable)

    def word(self, offset: int) -> memoryview:
        """An unsigned 8-byte word, at [0]."""
        return memoryview(self.shared)[offset : offset + WORD].cast("Q")

    def close(self) -> None:
        """Nobody else can open it from now on, where this process has made it. Again: nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Doorbell:
    """Wakes one process that sleeps on `fd`. Ringing twice is as good as once."""

    def __init__(self, fd: int, address: str) -> None:
        self.fd = fd
        self.address = address

    @classmethod
    def create(cls) -> "Doorbell":
        out, into = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.close(into)
        # Read and write, so that neither a peer's death nor its closing ends the pipe.
        bell = cls(_open(_address(out), os.O_RDWR | os.O_NONBLOCK), _address(out))
        os.close(out)
        bell.address = _address(bell.fd)
        return bell

    @classmethod
    def open(cls, address: str) -> "Doorbell":
        return cls(_open(address, os.O_RDWR | os.O_NONBLOCK), address)

    def ring(self) -> None:
        try:
            os.write(self.fd, b"\0")
        except BlockingIOError:
            return  # full: it rings already

    def clear(self) -> None:
        try:
            while len(os.read(self.fd, 4096)) == 4096:
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Fence:
    """What comes before a call is done, for other processes too, before what comes after it. Python has no fence of
    its own: giving a lock back and taking it again is a store-release and then a load-acquire, which together are one.
    """

    def __init__(self) -> None:
        lock = Lock()
        lock.acquire()
        self._release, self._acquire = lock.release, lock.acquire

    def __call__(self) -> None:
        self._release()
        self._acquire()


def _address(fd: int) -> str:
    return f"/proc/{os.getpid()}/fd/{fd}"


def _open(address: str, flags: int) -> int:
    try:
        return os.open(address, flags | os.O_CLOEXEC)
    except OSError as error:
        raise RankLost(f"the rank that shares {address} is gone: {error.strerror}") from None
