"""What both doors, gRPC and HTTP, have behind them: the served model and the requests to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.errors import BatonError
from ..core.ids import RequestId
from ..observe.metrics import RouterMetrics
from ..v1 import inference_pb2 as pb
from .fleet import ServedModel
from .placement import WorkerView
from .records import Record, Records
from .relay import Relay
from .validation import Draft, Prompt, check_model, check_request_id, draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A request that runs, or ran lately. Attach a reader before the next await."""

    record: Record
    draft: Draft


class Inference:
    """`served`: the model as the workers describe it, None before one came. `ready`: requests can run now. `workers`:
    those that are linked."""

    def __init__(
        self,
        *,
        model_name: str,
        relay: Relay,
        records: Records,
        metrics: RouterMetrics,
        served: Callable[[], ServedModel | None],
        ready: Callable[[], bool],
        workers: Callable[[], Sequence[WorkerView]],
    ) -> None:
        self.workers = workers
        self.model_name = model_name
        self.tokenizer = relay.tokenizer
        self._relay = relay
        self._records = records
        self._metrics = metrics
        self._served = served
        self._ready = ready

    @property
    def ready(self) -> bool:
        return self._ready()

    def model(self, name: str = "") -> ServedModel:
        """The served model; without lengths before its first worker came. Raises UnknownModel."""
        unknown_yet = ServedModel(
            name=self.model_name, max_model_len=0, vocab_size=self.tokenizer.vocab_size, dtype="", fingerprint=""
        )
        check_model(name, self.model_name)
        return self._served() or unknown_yet

    def submit(
        self, request: pb.GenerateRequest, timeout_s: float | None, traceparent: str, tenant: str = ""
    ) -> Submitted:
        """`tenant`: see tenants.py. Raises what validation.draft and Relay.open raise, and Unavailable before the first
        worker came."""
        try:
            check_model(request.model, self.model_name)
            drafted = draft(request, self._relay.limits(), self._relay.defaults)
            return Submitted(record=self._relay.open(drafted, timeout_s, traceparent, tenant), draft=drafted)
        except BatonError as error:
            self._metrics.refused(error.code)
            raise

    async def tokenise(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokens as `submit` would make them, of any length."""
        return await self._relay.tokenise(prompt, max_tokens=None)

    async def detokenise(self, token_ids: tuple[int, ...]) -> str:
        return await self._relay.detokenise(token_ids)

    def cancel(self, request_id: str) -> bool:
        """Whether the request is known. Raises InvalidRequest."""
        return self._relay.cancel(check_request_id(request_id))

    def record(self, request_id: str) -> Record:
        """Raises InvalidRequest, UnknownRequest."""
        return self._records.get(RequestId(check_request_id(request_id)))
