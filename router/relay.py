"""One request from arrival to end: tokenise, settle, place, admit, stream; again elsewhere when a worker is lost.

Each request is one task, apart from the clients that read its record. It ends in exactly one way: finished, cancelled
(by the Cancel RPC, or because its last reader left) or failed; and whichever it is, every seat it took is released.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from ..core.errors import BatonError, DeadlineExceeded, Unavailable, UnknownRequest
from ..core.ids import RequestId, SequenceId, WorkerId, sequence_id
from ..core.request import FinishReason, Request, Sampling
from ..observe import names
from ..text.generation_config import GenerationDefaults
from ..text.settling import ModelLimits, settle
from ..text.streaming import AnswerText
from ..text.tokenizer import Tokenizer
from .answer import Answer
from .attempt import Attempt, nth_try
from .placement import Need
from .records import Delta, Record, Records
from .telemetry import Telemetry, Trace
from .validation import Draft, Prompt
from .workers import Seats, Workers

MAX_TRIES = 3
BACKOFF_S = 0.1  # before the second try; four times as long before the third
log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True, kw_only=True)
class _Job:
    """A running request."""

    record: Record
    drafted: Draft
    deadline: float  # of the event loop's clock
    trace: Trace
    tenant: str
    answers: list[Answer] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    cancelled: bool = False


class Relay:
    """Runs requests. One event loop; the tokenizer's work is done by `executor`."""

    def __init__(
        self,
        *,
        workers: Workers,
        limits: Callable[[], ModelLimits],
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        records: Records,
        telemetry: Telemetry,
        executor: Executor,
        max_timeout_s: float,
    ) -> None:
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._workers = workers
        self.limits = limits
        self._records = records
        self._telemetry = telemetry
        self._executor = executor
        self._max_timeout_s = max_timeout_s
        self._jobs: dict[RequestId, _Job] = {}
        self.draining = False

    def open(self, drafted: Draft, timeout_s: float | None, traceparent: str = "", tenant: str = "") -> Record:
        """Starts the request, or finds it when it was asked for before. Attach a reader before the next await: a
        request whose last reader left is cancelled. One that failed, or that was cancelled so, is tried anew.

        `timeout_s`: what the client gives it; never more than the router's own limit. `tenant`: whose account it goes
        to; of a request that is known already it changes nothing.
        Raises RequestConflict, UnknownRequest (nothing to resume), Overloaded, Unavailable (draining).
        """
        if drafted.request_id:
            known = self._records.known(drafted.request_id, drafted.digest)
            if known is not None and not known.void:
                return known
            if known is not None and known.seq and drafted.seed is None:
                drafted = replace(drafted, seed=known.course.seed)
            if drafted.resume_after_seq and not drafted.repeatable:
                raise UnknownRequest(
                    "nothing to resume: no request of that id is known, or it ended too long ago, and without a seed, "
                    "or with several answers, it can't be repeated"
                )
        if self.draining:
            raise Unavailable("this router is stopping; ask another one, or try again")
        request_id = drafted.request_id or RequestId(f"req-{secrets.token_hex(12)}")
        record = self._records.open(request_id, drafted.digest)
        allowed = self._max_timeout_s if timeout_s is None else min(timeout_s, self._max_timeout_s)
        deadline = asyncio.get_running_loop().time() + allowed
        trace = self._telemetry.begin(record, drafted, traceparent)
        job = _Job(record=record, drafted=drafted, deadline=deadline, trace=trace, tenant=tenant)
        record.on_abandoned = lambda: self._abandon(job)
        self._jobs[request_id] = job
        with trace.current():  # the task's log lines carry the request's and the trace's ids
            job.task = asyncio.create_task(self._run(job), name=request_id)
        job.task.add_done_callback(lambda task: self._end(job, task))
        return record

    def cancel(self, request_id: RequestId) -> bool:
        """Whether the request is known. Cancelling it twice, or after its end, changes nothing."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._cancel(job)
        return job is not None or self._records.find(request_id) is not None

    async def drain(self, timeout_s: float) -> None:
        """Takes no new request; gives the running ones that long, then ends them."""
        self.draining = True
        tasks = [job.task for job in self._jobs.values() if job.task]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            log.warning("%d requests did not end in %.0f s and were ended", len(late), timeout_s)
            await asyncio.wait(late, timeout=2)

    async def tokenise(self, prompt: Prompt, max_tokens: int | None) -> tuple[int, ...]:
        """Tokens of text or chat, off the event loop. `max_tokens`: a prompt that surely has more is refused at once.
        Raises InvalidRequest, ContextExceeded."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        loop = asyncio.get_running_loop()
        if prompt.messages is not None:
            return tuple(
                await loop.run_in_executor(self._executor, self.tokenizer.encode_chat, prompt.messages, max_tokens)
            )
        return tuple(await loop.run_in_executor(self._executor, self.tokenizer.encode, prompt.text, True, max_tokens))

    async def detokenise(self, token_ids: tuple[int, ...]) -> str:
        """Their text, special tokens left out; off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self.tokenizer.decode, token_ids)

    def _abandon(self, job: _Job) -> None:
        job.record.abandoned = not job.cancelled  # by name it is cancelled for good
        self._cancel(job)

    def _cancel(self, job: _Job) -> None:
        job.cancelled = True
        if job.task is not None:
            job.task.cancel()

    async def _run(self, job: _Job) -> None:
        async with asyncio.timeout_at(job.deadline):
            limits = self.limits()
            with job.trace.part(names.SPAN_TOKENISE):
                prompt = await self.tokenise(job.drafted.prompt, limits.max_model_len)
            course = job.record.course
            course.prompt_tokens = len(prompt)
            course.seed = secrets.randbits(64) if job.drafted.seed is None else job.drafted.seed
            samplings = settle(job.drafted, len(prompt), course.seed, limits, self.defaults)
            course.state = "placing"
            job.answers = [self._new_answer(job, sampling, prompt) for sampling in samplings]
            requests = [self._request(job, prompt, sampling) for sampling in samplings]
            if len(requests) == 1:
                await self._answer(job, job.answers[0], requests[0])
                return
            try:
                async with asyncio.TaskGroup() as group:
                    for answer, request in zip(job.answers, requests, strict=True):
                        group.create_task(self._answer(job, answer, request))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None  # the first failure ended the others

    async def _answer(self, job: _Job, answer: Answer, request: Request) -> None:
        """One of the n answers, on as many workers as it takes."""
        avoid: frozenset[WorkerId] = frozenset()
        loop = asyncio.get_running_loop()
        for number in range(MAX_TRIES):
            need = Need(prompt_tokens=len(request.prompt), max_tokens=request.sampling.max_tokens, avoid=avoid)
            with job.trace.part(names.SPAN_PLACE):
                seats = await self._workers.seats(need)
            self._placed(job, seats)
            attempt = nth_try(replace(request, timeout_s=max(job.deadline - loop.time(), 0.001)), number)
            try:
                await Attempt(answer, seats).run(attempt)
                return
            except BatonError as error:
                if not error.retryable or number + 1 == MAX_TRIES:
                    raise
                log.warning("try %d of %d failed: %s: %s", number + 1, MAX_TRIES, error.code, error)
                avoid |= {seat.worker_id for seat in (seats.prefill, seats.decode) if seat is not None}
                job.trace.retried(error)
            await asyncio.sleep(BACKOFF_S * 4**number * random.uniform(0.5, 1.0))  # noqa: S311

    def _new_answer(self, job: _Job, sampling: Sampling, prompt: tuple[int, ...]) -> Answer:
        text = AnswerText(self.tokenizer, job.drafted.stops, sampling.stop_token_ids)

        def emit(delta: Delta) -> None:
            job.trace.given(delta)
            if delta.token_ids:
                job.record.course.state = "decoding"
            job.record.append(delta)

        return Answer(sampling, text, emit, prompt=prompt, each_token=job.drafted.resume_after_seq > 0)

    def _request(self, job: _Job, prompt: tuple[int, ...], sampling: Sampling) -> Request:
        name = sequence_id(job.record.request_id, sampling.branch)
        if job.record.run:
            name = SequenceId(f"{name}+{job.record.run}")  # what the run before it has under way is not this one's
        return Request(
            sequence_id=name,
            prompt=prompt,
            sampling=sampling,
            traceparent=job.trace.traceparent,
            priority=job.drafted.priority,
            tenant=job.tenant,
        )

    def _placed(self, job: _Job, seats: Seats) -> None:
        record, placement = job.record, seats.placement
        course = record.course
        if course.placed is None:
            course.placed = record.clock()
        if not record.seq:
            course.state = "prefilling"
        course.prefill_worker = placement.prefill
        course.decode_worker = placement.decode or ""
        course.placement = placement.reason
        job.trace.placed(course.prefill_worker, course.decode_worker)

    def _end(self, job: _Job, task: "asyncio.Task[None]") -> None:
        """The one place where a record ends. A task that was cancelled before its first step comes here too."""
        record = job.record
        if job.answers:
            record.course.cached_tokens = job.answers[0].cached_tokens
        error: BaseException | None = None
        if task.cancelled() and job.cancelled:
            self._end_cancelled(job)
        elif task.cancelled():
            error = Unavailable("the router is stopping; ask another one, or try again")
        elif (raised := task.exception()) is None:
            record.finish("finished", record.usage())
        elif isinstance(raised, TimeoutError):
            error = DeadlineExceeded("the request's deadline passed")
        else:
            error = raised
            if not isinstance(raised, BatonError):
                with job.trace.current():
                    log.error("a request failed by a mistake in the router", exc_info=raised)
        if error is not None:
            record.fail(error)
        reasons = [str(answer.finished or FinishReason.CANCELLED) for answer in job.answers]
        job.trace.end(reasons or [FinishReason.CANCELLED], error)
        del self._jobs[record.request_id]
        self._records.close(record)

    def _end_cancelled(self, job: _Job) -> None:
        for answer in job.answers:
            answer.finish(FinishReason.CANCELLED)
        if not job.answers:  # it had no time to begin any
            for index in range(job.drafted.answers):
                job.record.append(Delta(index=index, finish=FinishReason.CANCELLED))
        job.record.finish("cancelled", job.record.usage())
