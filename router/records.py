"""What the router knows of each request: its event log, which any number of readers follow, and how it went.

A record is written by one task and read by its readers, all on one event loop. A reader is a place in the log and
nothing more: a slow one finds more entries when it comes back and gets them merged into one message, so it costs no
memory and holds up no one. The log of one request is bounded by its n * max_tokens, all of them by `Records`.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..core.errors import BatonError, InvalidRequest, Overloaded, RequestConflict, UnknownRequest
from ..core.ids import RequestId
from ..core.request import FinishReason, PromptLogprob, TokenLogprobs

MAX_MERGED_TOKENS = 4096
"""Most tokens in one message of a stream; a twentieth of it with logprobs, so that a message stays below 4 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new in one answer."""

    index: int  # which of the n answers
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    prompt_logprobs: tuple[PromptLogprob, ...] = ()  # with the answer's first token, when asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int  # over all answers
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a reader gets at once. `usage` comes with the last one and only there."""

    seq: int  # tokens of this request up to and with this message
    outputs: tuple[Delta, ...]
    usage: Usage | None = None


@dataclass(slots=True, kw_only=True)
class Course:
    """How a request goes, for Explain, the trace and the metrics. Times are seconds of the record's clock."""

    state: str = "tokenising"
    trace_id: str = ""
    seed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    placement: str = ""
    arrived: float = 0.0
    placed: float | None = None
    first_token: float | None = None
    ended: float | None = None


@dataclass(eq=False)
class Record:
    """One request. Ends exactly once: with a usage or with an error."""

    request_id: RequestId
    digest: bytes
    clock: Callable[[], float] = time.monotonic
    on_abandoned: Callable[[], None] = lambda: None  # the last reader left a running request
    course: Course = field(default_factory=Course)
    seq: int = 0
    weight: int = 0  # of its log: tokens, and log probabilities
    run: int = 0  # which try at it: a void one before it counts
    abandoned: bool = False  # cancelled because its last reader left
    _log: list[tuple[int, Delta]] = field(default_factory=list)  # (seq with this delta, delta)
    _usage: Usage | None = None
    _error: BaseException | None = None
    _readers: set[asyncio.Event] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.course.arrived = self.clock()

    @property
    def ended(self) -> bool:
        return self.course.ended is not None

    @property
    def void(self) -> bool:
        """It ended without an answer that its client had asked to end: who asks again asks for a new try."""
        return self.course.state == "failed" or (self.course.state == "cancelled" and self.abandoned)

    def append(self, delta: Delta) -> None:
        """Adds to the log. Not after the end."""
        assert not self.ended, self.request_id
        if delta.token_ids and self.course.first_token is None:
            self.course.first_token = self.clock()
        self.seq += len(delta.token_ids)
        self.weight += len(delta.token_ids)
        self.weight += sum(1 + len(entry.top) for entry in delta.logprobs)
        self.weight += sum(1 + len(entry.top) for entry in delta.prompt_logprobs)
        self._log.append((self.seq, delta))
        self._wake()

    def finish(self, state: str, usage: Usage) -> None:
        self._end(state)
        self._usage = usage

    def fail(self, error: BaseException) -> None:
        self._end("failed")
        self._error = error

    def usage(self) -> Usage:
        course = self.course
        return Usage(prompt_tokens=course.prompt_tokens, completion_tokens=self.seq, cached_tokens=course.cached_tokens)

    @contextmanager
    def attached(self) -> Iterator["Reader"]:
        """A reader for the time of the block. When the last one leaves before the end, the request is abandoned."""
        reader = Reader(self)
        self._readers.add(reader.news)
        try:
            yield reader
        finally:
            self._readers.discard(reader.news)
            if not self._readers and not self.ended:
                self.on_abandoned()

    def outcome(self) -> Usage:
        """Of an ended request: its usage, or raises its error."""
        if self._error is not None:
            error = self._error
            # A fresh copy: several readers may raise it, each with a traceback of its own.
            raise type(error)(*error.args) if isinstance(error, BatonError) else error
        assert self._usage is not None
        return self._usage

    def entries(self, start: int, limit: int) -> list[tuple[int, Delta]]:
        return self._log[start : start + limit]

    def start_after(self, seq: int) -> int:
        """Index of the first entry that a client lacks who has everything up to `seq`. Raises InvalidRequest.

        An entry without tokens at `seq` itself is given again, as the client may lack it: it can repeat an end.
        """
        if seq > self.seq:
            raise InvalidRequest(f"resume_after_seq is {seq}, but the answer has only {self.seq} tokens")
        if not seq:
            return 0
        return next(
            (at for at, (upto, delta) in enumerate(self._log) if upto > seq or (upto == seq and not delta.token_ids)),
            len(self._log),
        )

    def _end(self, state: str) -> None:
        assert not self.ended, self.request_id
        self.course.state = state
        self.course.ended = self.clock()
        self._wake()

    def _wake(self) -> None:
        for news in self._readers:
            news.set()


class Reader:
    """One client's place in a record's log."""

    def __init__(self, record: Record) -> None:
        self.news = asyncio.Event()
        self._record = record

    async def messages(self, after_seq: int = 0, final_only: bool = False) -> AsyncIterator[Message]:
        """All that came after `after_seq`, merged as far as it has piled up. Ends after the message with the usage, or
        raises the request's error. A record ends by its deadline, so this does too."""
        record = self._record
        while after_seq > record.seq and not record.ended:  # a new try at it, which is not yet where the client is
            self.news.clear()
            await self.news.wait()
        if after_seq > record.seq:
            record.outcome()  # its error, if it failed
        at = record.start_after(after_seq)
        seq = after_seq
        while True:
            self.news.clear()
            ended = record.ended
            fresh = [] if final_only and not ended else record.entries(at, self._limit(final_only))
            at += len(fresh)
            seq = fresh[-1][0] if fresh else seq
            if ended and not record.entries(at, 1):
                if final_only or record.course.state != "failed":
                    usage = record.outcome()  # raises before anything is sent
                    yield Message(seq=seq, outputs=merge([delta for _, delta in fresh]), usage=usage)
                    return
                if fresh:
                    yield Message(seq=seq, outputs=merge([delta for _, delta in fresh]))
                record.outcome()
            elif fresh:
                yield Message(seq=seq, outputs=merge([delta for _, delta in fresh]))
            else:
                await self.news.wait()

    def _limit(self, final_only: bool) -> int:
        if final_only:
            return 1 << 62
        first = self._record.entries(0, 1)
        return MAX_MERGED_TOKENS // 20 if first and first[0][1].logprobs else MAX_MERGED_TOKENS


def merge(deltas: list[Delta]) -> tuple[Delta, ...]:
    """One delta per answer, in the order of the answers."""
    if len(deltas) == 1:
        return (deltas[0],)
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return tuple(
        Delta(
            index=index,
            text="".join(delta.text for delta in parts),
            token_ids=tuple(token for delta in parts for token in delta.token_ids),
            logprobs=tuple(entry for delta in parts for entry in delta.logprobs),
            finish=next((delta.finish for delta in reversed(parts) if delta.finish), None),
            prompt_logprobs=next((delta.prompt_logprobs for delta in parts if delta.prompt_logprobs), ()),
        )
        for index, parts in sorted(by_index.items())
    )


class Records:
    """All requests that run, and the lately ended: for `keep_s` seconds, at most `max_ended` of them and at most
    `max_ended_tokens` tokens and log probabilities in their logs, the oldest forgotten first."""

    def __init__(
        self,
        *,
        max_running: int,
        max_ended: int,
        max_ended_tokens: int,
        keep_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_running = max_running
        self._max_ended = max_ended
        self._max_ended_tokens = max_ended_tokens
        self._keep_s = keep_s
        self._clock = clock
        self._running: dict[RequestId, Record] = {}
        self._ended: OrderedDict[RequestId, Record] = OrderedDict()
        self._ended_tokens = 0

    @property
    def running(self) -> tuple[Record, ...]:
        return tuple(self._running.values())

    def known(self, request_id: RequestId, digest: bytes) -> Record | None:
        """The record of a repeated request. Raises RequestConflict when the id names a different one."""
        record = self.find(request_id)
        if record is not None and record.digest != digest:
            raise RequestConflict("this request_id belongs to a different request; use another one")
        return record

    def open(self, request_id: RequestId, digest: bytes) -> Record:
        """A record for a request that is not known, or whose record is void. Raises Overloaded."""
        if len(self._running) >= self._max_running:
            raise Overloaded(f"{self._max_running} requests are running here, which is the most; try again soon")
        record = Record(request_id, digest, self._clock)
        void = self._ended.get(request_id)
        if void is not None:
            record.run = void.run + 1
            self._drop(void)
        self._running[request_id] = record
        return record

    def close(self, record: Record) -> None:
        """Of an ended record: starts its time to be forgotten."""
        assert record.ended
        del self._running[record.request_id]
        self._ended[record.request_id] = record
        self._ended_tokens += record.weight
        self._forget()

    def find(self, request_id: RequestId) -> Record | None:
        self._forget()
        return self._running.get(request_id) or self._ended.get(request_id)

    def get(self, request_id: RequestId) -> Record:
        """Raises UnknownRequest."""
        record = self.find(request_id)
        if record is None:
            raise UnknownRequest("no request of that id is known, or it ended too long ago")
        return record

    def _forget(self) -> None:
        oldest_kept = self._clock() - self._keep_s
        while self._ended:
            record = next(iter(self._ended.values()))
            ended_at = record.course.ended
            assert ended_at is not None
            if (
                ended_at > oldest_kept
                and len(self._ended) <= self._max_ended
                and self._ended_tokens <= self._max_ended_tokens
            ):
                return
            self._drop(record)

    def _drop(self, record: Record) -> None:
        del self._ended[record.request_id]
        self._ended_tokens -= record.weight
