"""The service's side of the ring: links, questions, and whether the rank lives. On one asyncio loop; nothing polls."""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count

from ..core.errors import Overloaded, WorkerLost
from ..core.frames import Command, Report
from ..core.request import Request
from ..v1 import link_pb2
from ..wire import codec, worker_codec
from .records import Kind, Progress, Ready, Record, decode_progress, decode_ready
from .ring import RingFull, RingPair
from .roster import failed

_FULL_RING_S = 0.005
_MAX_FRAMES = 8192  # of one link that its router does not read; then the link is cut
_MAX_FRAME_BYTES = 64 << 20


class RankLink:
    """One router's link, as the service sees it."""

    def __init__(self, number: int, client: "RankClient") -> None:
        self.number = number
        self._client = client
        self._frames: deque[link_pb2.ConnectResponse] = deque()
        self._num_bytes = 0
        self._news = asyncio.Event()
        self._error: Exception | None = None

    async def send(self, commands: list[Command]) -> None:
        """Pass commands on, in order. While the ring is full new sequences are refused (Overloaded), all else waits."""
        try:
            self._client.put_now(Record(Kind.FRAME, self.number, codec.commands_to_bytes(commands)))
            return
        except RingFull:
            error = Overloaded("the worker takes no more commands at the moment")
        refused = [failed(command.sequence_id, error) for command in commands if isinstance(command, Request)]
        if refused:
            self.push(link_pb2.ConnectResponse(ended=[codec.encode_ended(ended) for ended in refused]))
        rest = [command for command in commands if not isinstance(command, Request)]
        if rest:
            await self._client.put(Record(Kind.FRAME, self.number, codec.commands_to_bytes(rest)))

    async def frames(self) -> AsyncIterator[link_pb2.ConnectResponse]:
        """What the rank says on this link. Ends by raising what `end` was given; Overloaded when nobody reads it."""
        while True:
            while self._frames:
                frame = self._frames.popleft()
                self._num_bytes -= frame.ByteSize()
                yield frame
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()

    def push(self, frame: link_pb2.ConnectResponse) -> None:
        if self._error is not None:
            return
        self._frames.append(frame)
        self._num_bytes += frame.ByteSize()
        if len(self._frames) > _MAX_FRAMES or self._num_bytes > _MAX_FRAME_BYTES:
            self._frames.clear()
            self.end(Overloaded("the router does not read its link"))
        self._news.set()

    def end(self, error: Exception) -> None:
        """The link's frames end with this error, once."""
        self._error = self._error or error
        self._news.set()


class RankClient:
    """Owns the ring on behalf of the service. All methods belong to the loop it was made on."""

    def __init__(
        self,
        rings: RingPair,
        on_report: Callable[[Report], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._rings = rings
        self._on_report = on_report
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        self._links: dict[int, RankLink] = {}
        self._numbers = count(1)
        self._questions: dict[int, asyncio.Future[bytes]] = {}
        self._backlog: deque[tuple[Record, asyncio.Future[None]]] = deque()
        self.ready: asyncio.Future[Ready] = self._loop.create_future()
        self.lost: asyncio.Future[None] = self._loop.create_future()  # done when the rank has died
        self._pidfd = os.pidfd_open(rings.incoming.writer_pid)
        self._loop.add_reader(self._pidfd, self._on_death)
        self._loop.add_reader(rings.incoming.fd, self._on_bell)
        self._on_bell()  # what came before we listened

    @asynccontextmanager
    async def link(self) -> AsyncIterator[RankLink]:
        """A new link; however it ends, the rank ends its sequences."""
        link = RankLink(next(self._numbers), self)
        if self.lost.done():
            raise WorkerLost("the worker's step loop has died")
        self._links[link.number] = link
        try:
            yield link
        finally:
            del self._links[link.number]
            self._post(Record(Kind.LINK_CLOSED, link.number))

    async def ask(self, kind: Kind, body: bytes, timeout_s: float) -> bytes:
        """A question's answer, given between two steps. Raises WorkerLost, TimeoutError."""
        if self.lost.done():
            raise WorkerLost("the worker's step loop has died")
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._questions[number] = answer
        try:
            async with asyncio.timeout(timeout_s):
                await self.put(Record(kind, number, body))
                return await answer
        finally:
            del self._questions[number]

    def put_now(self, record: Record) -> None:
        """Raises RingFull, also while older records wait."""
        if self._backlog:
            raise RingFull("older records wait")
        self._rings.outgoing.put(*record.parts())

    async def put(self, record: Record) -> None:
        """In order; waits while the ring is full. A caller that gives up has still sent it."""
        await asyncio.shield(self._post(record))

    def close(self) -> None:
        self._loop.remove_reader(self._rings.incoming.fd)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._fail(WorkerLost("the worker stops"))

    def _post(self, record: Record) -> "asyncio.Future[None]":
        sent = self._loop.create_future()
        self._backlog.append((record, sent))
        if len(self._backlog) == 1:
            self._flush()
        return sent

    def _flush(self) -> None:
        while self._backlog:
            record, sent = self._backlog[0]
            if not self.lost.done():
                try:
                    self._rings.outgoing.put(*record.parts())
                except RingFull:
                    self._loop.call_later(_FULL_RING_S, self._flush)
                    return
            self._backlog.popleft()
            if not sent.done():
                sent.set_result(None)

    def _on_bell(self) -> None:
        for data in self._rings.incoming.take():
            self._take(Record.parse(data))

    def _take(self, record: Record) -> None:
        match record.kind:
            case Kind.FRAME:
                link = self._links.get(record.number)
                if link is not None:
                    link.push(codec.parse(link_pb2.ConnectResponse, record.body))
            case Kind.REPORT:
                self._on_report(worker_codec.report_from_bytes(record.body))
            case Kind.PROGRESS:
                self._on_progress(decode_progress(record.body))
            case Kind.READY:
                if not self.ready.done():
                    self.ready.set_result(decode_ready(record.body))
            case Kind.LEDGER | Kind.STATUS | Kind.DRAIN | Kind.REMAINING:
                answer = self._questions.get(record.number)
                if answer is not None and not answer.done():
                    answer.set_result(record.body)
            case _:
                raise AssertionError(f"a service never gets {record.kind!r}")

    def _on_death(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._on_bell()  # its last words
        self._fail(WorkerLost("the worker's step loop has died"))

    def _fail(self, error: Exception) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        for link in self._links.values():
            link.end(error)
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(error)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # whoever waits for it gets it; nobody has to
