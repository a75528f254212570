"""What a request leaves behind in traces, metrics and logs. Its root span is made here; workers' spans hang from it."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import BatonError
from ..observe import names
from ..observe.logs import request_context
from ..observe.metrics import RouterMetrics
from ..observe.tracing import RequestSpan, Tracing, Value
from .records import Delta, Record
from .validation import Draft

log = logging.getLogger(__name__)


class Telemetry:
    def __init__(self, tracing: Tracing, metrics: RouterMetrics, model: str) -> None:
        self.metrics = metrics
        self._tracing = tracing
        self._model = model

    def begin(self, record: Record, drafted: Draft, traceparent: str) -> "Trace":
        """A request was accepted. `traceparent`: of its client; may be empty or malformed."""
        sampling = drafted.sampling
        attributes: dict[str, Value] = {
            names.REQUEST_ID: record.request_id,
            names.GEN_AI_RESPONSE_ID: record.request_id,
            names.GEN_AI_RESPONSE_MODEL: self._model,
            names.GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
            names.GEN_AI_REQUEST_TOP_P: sampling.top_p,
            names.GEN_AI_REQUEST_TOP_K: sampling.top_k,
            names.GEN_AI_REQUEST_CHOICES: drafted.answers,
        }
        if sampling.presence_penalty:
            attributes[names.GEN_AI_REQUEST_PRESENCE] = sampling.presence_penalty
        if sampling.frequency_penalty:
            attributes[names.GEN_AI_REQUEST_FREQUENCY] = sampling.frequency_penalty
        if drafted.max_tokens is not None:
            attributes[names.GEN_AI_REQUEST_MAX_TOKENS] = drafted.max_tokens
        if drafted.stops:
            attributes[names.GEN_AI_REQUEST_STOP] = drafted.stops
        operation = names.OPERATION_CHAT if drafted.is_chat else names.OPERATION_TEXT
        span = self._tracing.request(operation, self._model, traceparent, attributes)
        record.course.trace_id = span.trace_id
        self.metrics.started()
        return Trace(span, self.metrics, record)


class Trace:
    """One request's span, and what is counted of it."""

    def __init__(self, span: RequestSpan, metrics: RouterMetrics, record: Record) -> None:
        self.traceparent = span.traceparent
        self._span = span
        self._metrics = metrics
        self._record = record
        self._last_tokens: dict[int, float] = {}  # when each answer last got tokens

    @contextmanager
    def current(self) -> Iterator[None]:
        """Log lines within it, and within tasks begun in it, carry the request's and the trace's ids."""
        with request_context(self._record.request_id, self._span.trace_id):
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A child span over the block, however it ends."""
        start_ns = time.time_ns()
        try:
            yield
        finally:
            self._span.part(name, start_ns)

    def placed(self, prefill: str, decode: str) -> None:
        self._span.set({names.PREFILL_WORKER: prefill, names.DECODE_WORKER: decode})

    def retried(self, error: BatonError) -> None:
        self._span.event("retry", {names.ERROR_TYPE: error.code})

    def given(self, delta: Delta) -> None:
        """New tokens of one answer; called before the record knows of them."""
        if not delta.token_ids:
            return
        record = self._record
        now = record.clock()
        if not record.seq:
            self._metrics.first_token(now - record.course.arrived)
        last = self._last_tokens.get(delta.index)
        self._last_tokens[delta.index] = now
        self._metrics.completion(len(delta.token_ids), None if last is None else now - last)

    def end(self, reasons: list[str], error: BaseException | None) -> None:
        """Of an ended record. `reasons`: how each answer finished, where none failed."""
        course = self._record.course
        assert course.ended is not None
        attributes: dict[str, Value] = {
            names.GEN_AI_REQUEST_SEED: str(course.seed),  # beyond what a signed attribute holds
            names.GEN_AI_USAGE_INPUT: course.prompt_tokens,
            names.GEN_AI_USAGE_OUTPUT: self._record.seq,
            names.GEN_AI_USAGE_CACHED: course.cached_tokens,
            names.GEN_AI_RESPONSE_FINISH: reasons,
        }
        if course.first_token is not None:
            attributes[names.GEN_AI_RESPONSE_FIRST_CHUNK] = course.first_token - course.arrived
        self._span.set(attributes)
        self._span.end(error)
        outcome = type(error).__name__ if error is not None else reasons[0]
        self._metrics.prompt(course.prompt_tokens, course.cached_tokens)
        self._metrics.ended(outcome, course.ended - course.arrived)
        with self.current():
            log.info(
                "ended (%s): %d prompt tokens, %d cached, %d new in %.3f s",
                outcome,
                course.prompt_tokens,
                course.cached_tokens,
                self._record.seq,
                course.ended - course.arrived,
            )
