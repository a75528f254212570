"""The router's side of the stream between one router and one worker."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from ..core.errors import BatonError, Overloaded, StaleEpoch, Unavailable
from ..core.frames import Command, HandOver, Hello, WorkerFrame
from ..core.ids import Epoch, WorkerId
from ..core.request import Request
from ..v1 import link_pb2_grpc
from . import codec
from .channels import open_channel
from .server import BETWEEN_SERVICES, Limits
from .tls import ClientTls, bearer

EOF = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it

log = logging.getLogger(__name__)

MAX_FRAME_WEIGHT = 2**20  # tokens and block indices in one frame, after which the next begins


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    max_pending: int = 4096  # commands that wait to be written
    greeting_timeout_s: float = 5.0  # from the first try to connect to the worker's Welcome
    write_timeout_s: float = 10.0  # a worker that reads nothing for so long is lost
    backoff_s: float = 0.1  # before the first try again; doubles, with jitter
    max_backoff_s: float = 5.0
    limits: Limits = BETWEEN_SERVICES


class Link:
    """Keeps one stream to the worker at `address` open, and opens it again whenever it is lost.

    `on_state(True)` after each greeting, then `on_frame` for every frame in order, then `on_state(False)` exactly once
    when the stream is lost or the link closed. Commands not written by then are dropped: the worker ends all sequences
    of a lost stream anyway. Callbacks run on the event loop and must not wait. One that raises ends the stream, since
    what it missed is not told again.
    """

    def __init__(
        self,
        address: str,
        worker: tuple[WorkerId, Epoch],
        router_id: str,
        token: str,
        on_frame: Callable[[WorkerFrame], None],
        on_state: Callable[[bool], None],
        *,
        tls: ClientTls | None = None,
        options: LinkOptions = LinkOptions(),
    ) -> None:
        """`worker`: the one, in the one life, that is linked; whoever else answers at `address` is not."""
        self.address = address
        self.connected = False
        self._worker = worker
        self._router_id = router_id
        self._token = token
        self._on_frame = on_frame
        self._on_state = on_state
        self._tls = tls
        self._options = options
        self._pending: deque[Command] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to connect; returns at once. Again changes nothing."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"link {self.address}")

    def send(self, command: Command) -> None:
        """Queues a command. All that one turn of the event loop queues goes out as one frame.

        Raises Unavailable when the link is down, Overloaded when the worker takes them too slowly.
        """
        if not self.connected:
            raise Unavailable("the link to the worker is down")
        if len(self._pending) >= self._options.max_pending:
            raise Overloaded("the worker takes commands too slowly")
        self._pending.append(command)
        self._wake.set()

    async def close(self) -> None:
        """Closes the stream and stays away. Again changes nothing."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        failures = 0
        while True:
            greeted = False
            try:
                async with open_channel(self.address, self._tls, self._options.limits) as channel:
                    call: Any = link_pb2_grpc.LinkServiceStub(channel).Connect(metadata=bearer(self._token))
                    first = await self._greet(call)
                    greeted = True
                    await self._live(call, first)
                reason = "the worker closed it"
            except (grpc.aio.AioRpcError, BatonError, TimeoutError) as error:
                reason = _reason(error)
            except asyncio.InvalidStateError:  # a write to a stream that has just ended
                reason = "the worker closed it"
            except Exception:  # of a callback, or a bug: the link must come back all the same
                log.exception("link to %s failed", self.address)
                reason = "an internal error"
            failures = 1 if greeted else failures + 1
            log.log(logging.WARNING if failures == 1 else logging.DEBUG, "link to %s: %s", self.address, reason)
            await asyncio.sleep(self._backoff(failures))

    def _backoff(self, failures: int) -> float:
        longest = min(self._options.max_backoff_s, self._options.backoff_s * 2.0 ** min(failures - 1, 30))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 (jitter, no secret)

    async def _greet(self, call: Any) -> WorkerFrame:
        async with asyncio.timeout(self._options.greeting_timeout_s):
            await call.write(codec.encode_commands([Hello(router_id=self._router_id)]))
            message = await call.read()
        if message is EOF:
            raise Unavailable("the worker closed it without a greeting")
        frame = codec.decode_frame(message)
        if frame.welcome is None:
            raise Unavailable("the worker's first frame held no greeting")
        if (frame.welcome.worker_id, frame.welcome.epoch) != self._worker:
            raise StaleEpoch("another worker, or another life of it, answers there")
        return frame

    async def _live(self, call: Any, first: WorkerFrame) -> None:
        self._pending.clear()
        self._wake.clear()
        self.connected = True
        tasks: list[asyncio.Task[None]] = []
        try:
            self._on_state(True)
            self._on_frame(first)
            tasks += [asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))]
            for task in tasks:
                task.add_done_callback(_seen)
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self.connected = False
            self._pending.clear()
            for task in tasks:
                task.cancel()
            call.cancel()
            try:
                self._on_state(False)
            except Exception:  # raised here, it would hide that the link is being closed
                log.exception("link to %s: the loss was not taken", self.address)

    async def _read(self, call: Any) -> None:
        while (message := await call.read()) is not EOF:
            self._on_frame(codec.decode_frame(message))

    async def _write(self, call: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                async with asyncio.timeout(self._options.write_timeout_s):
                    await call.write(codec.encode_commands(self._next_frame()))

    def _next_frame(self) -> list[Command]:
        commands: list[Command] = []
        weight = 0
        while self._pending and len(commands) < codec.MAX_COMMANDS and weight < MAX_FRAME_WEIGHT:
            command = self._pending.popleft()
            commands.append(command)
            weight += _weight(command)
        return commands


def _seen(task: asyncio.Task[None]) -> None:
    """Of two tasks that fail together one is reported; the other is not to be logged as forgotten."""
    if not task.cancelled():
        task.exception()


def _weight(command: Command) -> int:
    match command:
        case Request(prompt=prompt):
            return len(prompt)
        case HandOver(ticket=ticket):
            return len(ticket.wanted)
        case _:
            return 1


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or "no answer in time"
