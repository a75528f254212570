"""Workers that do as a test tells them, and a relay on top of them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

from baton.core.errors import BatonError
from baton.core.ids import Epoch, TicketId, WorkerId
from baton.core.request import Ended, EndReason, FinishReason, Request, SequenceTokens, TokenLogprobs
from baton.core.tickets import Geometry, Ticket
from baton.observe.metrics import RouterMetrics
from baton.observe.tracing import Tracing
from baton.router.fleet import ServedModel
from baton.router.inference import Inference
from baton.router.placement import Need, Placement
from baton.router.records import Message, Record, Records
from baton.router.relay import Relay
from baton.router.telemetry import Telemetry
from baton.router.workers import Listener, News, Seats
from baton.text.generation_config import GenerationDefaults
from baton.text.settling import ModelLimits
from baton.text.tokenizer import Tokenizer
from baton.v1 import inference_pb2 as pb

EOS = 0
BYTE_0 = 1  # token 1 + n is byte n of the alphabet
VOCAB = 257
CONTEXT = 64


def geometry() -> Geometry:
    return Geometry(num_layers=1, num_kv_heads=1, head_size=8, block_tokens=16, dtype="float32", fingerprint="f")


def a_ticket(name: str) -> Ticket:
    return Ticket(
        ticket_id=TicketId(name),
        worker_id=WorkerId("decode"),
        epoch=Epoch(1),
        wanted=(0,),
        geometry=geometry(),
        lease_s=1.0,
        inbox="inbox",
    )


@dataclass(eq=False)
class FakeSeat:
    """A seat that remembers what became of it."""

    fleet: "FakeWorkers"
    worker_id: WorkerId
    request: Request | None = None
    listener: Listener | None = None
    ticket: Ticket | None = None
    ended: bool = False
    released: bool = False
    refuse: BatonError | None = None

    def admit(self, request: Request, listener: Listener) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.request, self.listener = request, listener
        self.fleet.on_admit(self)

    def hand_over(self, ticket: Ticket) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.ticket = ticket

    def release(self) -> None:
        self.released = True

    def tell(self, news: News) -> None:
        """What a worker may say: nothing after the release, nor after the end."""
        if not self.ended:
            self.fleet_tells(news)

    def fleet_tells(self, news: News) -> None:
        """As the fleet does: a lost link is told after the end too."""
        if self.released or self.listener is None:
            return
        self.ended = self.ended or news.ended is not None or news.lost
        self.listener(news)

    def tokens(self, first: int, ids: list[int], end: EndReason | None = None, cached: int = 0) -> None:
        assert self.request is not None
        name = self.request.sequence_id
        wanted = self.request.sampling.logprobs
        entry = TokenLogprobs(-0.5, tuple((token, -0.5) for token in range(10, 10 + (wanted or 0))))
        said = SequenceTokens(
            sequence_id=name,
            first_position=first,
            token_ids=tuple(ids),
            logprobs=() if wanted is None else (entry,) * len(ids),
            cached_tokens=cached,
            prompt_logprobs=of_prompt(self.request) if first == 0 else (),
        )
        self.tell(News(tokens=(said,), ended=end and Ended(sequence_id=name, reason=end)))

    def end(self, reason: EndReason, code: str = "", message: str = "") -> None:
        assert self.request is not None
        name = self.request.sequence_id
        self.tell(News(ended=Ended(sequence_id=name, reason=reason, error_code=code, error_message=message)))


def of_prompt(request: Request) -> tuple[TokenLogprobs | None, ...]:
    """-1, -2 ... for each token but the first, which is also the best."""
    wanted = request.sampling.prompt_logprobs
    if wanted is None:
        return ()
    tokens = enumerate(request.prompt[1:], 1)
    return (None, *(TokenLogprobs(-float(at), ((token, -float(at)),) * min(wanted, 1)) for at, token in tokens))


@dataclass(eq=False)
class FakeWorkers:
    """Gives everybody seats on "prefill" and "decode"; `on_admit` may answer at once or later."""

    alone: bool = False  # one worker that is both takes the place of the two

    on_admit: Callable[[FakeSeat], None] = lambda seat: None
    prefills: list[FakeSeat] = field(default_factory=list)
    decodes: list[FakeSeat] = field(default_factory=list)
    needs: list[Need] = field(default_factory=list)
    refuse: BatonError | None = None
    delay: int = 0  # turns of the event loop before a seat is given

    async def seats(self, need: Need) -> Seats:
        self.needs.append(need)
        for _ in range(self.delay):
            await asyncio.sleep(0)
        if self.refuse is not None:
            raise self.refuse
        prefill = FakeSeat(self, WorkerId("prefill"))
        self.prefills.append(prefill)
        decode = None
        if need.decodes and not self.alone:
            decode = FakeSeat(self, WorkerId("decode"))
            self.decodes.append(decode)
        placed = Placement(prefill=prefill.worker_id, decode=decode and decode.worker_id, reason="the only ones")
        return Seats(placement=placed, prefill=prefill, decode=decode)

    def assert_all_released(self) -> None:
        assert all(seat.released for seat in (*self.prefills, *self.decodes))


def answers_with(text: bytes, tokenizer: Tokenizer, end: EndReason = EndReason.STOP) -> Callable[[FakeSeat], None]:
    """Workers that answer every request with `text` and an end of sequence, or as much of it as max_tokens lets."""
    whole = [*tokenizer.encode(text.decode()), EOS]

    def on_admit(seat: FakeSeat) -> None:
        loop = asyncio.get_running_loop()
        assert seat.request is not None
        ids = whole[: seat.request.sampling.max_tokens]
        reason = EndReason.STOP if len(ids) == len(whole) else EndReason.LENGTH
        if seat.worker_id == "prefill":
            loop.call_soon(seat.tokens, 0, ids[:1], reason if len(ids) == 1 else None, 3)
            return
        loop.call_soon(seat.tell, News(ticket=a_ticket(seat.request.sequence_id)))
        for at in range(1, len(ids)):
            loop.call_later(0, seat.tokens, at, [ids[at]], reason if at == len(ids) - 1 else None)

    return on_admit


class Inline(Executor):
    """Does the work at once, so that a test knows how many turns of the loop a request takes."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@dataclass(eq=False)
class Bench:
    """A relay on fake workers, with all that it needs."""

    tokenizer: Tokenizer
    workers: FakeWorkers = field(default_factory=FakeWorkers)
    max_running: int = 64
    max_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        self.metrics = RouterMetrics()
        self.records = Records(max_running=self.max_running, max_ended=64, max_ended_tokens=1 << 16, keep_s=60.0)
        self.relay = Relay(
            workers=self.workers,
            limits=lambda: ModelLimits(name="m", max_model_len=CONTEXT, vocab_size=VOCAB),
            tokenizer=self.tokenizer,
            defaults=GenerationDefaults(eos_token_ids=frozenset({EOS})),
            records=self.records,
            telemetry=Telemetry(Tracing("baton-router"), self.metrics, "m"),
            executor=Inline(),
            max_timeout_s=self.max_timeout_s,
        )
        self.inference = Inference(
            model_name="m",
            relay=self.relay,
            records=self.records,
            metrics=self.metrics,
            served=lambda: ServedModel(
                name="m", max_model_len=CONTEXT, vocab_size=VOCAB, dtype="float32", fingerprint="f"
            ),
            ready=lambda: True,
            workers=list,
        )


def a_request(**sampling: Any) -> pb.GenerateRequest:
    asked = pb.SamplingParams(**{"max_tokens": 8, "seed": 7, **sampling})
    return pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=[5, 6, 7]), sampling=asked)


def submit(bench: Bench, request: pb.GenerateRequest, timeout_s: float | None = None) -> Record:
    return bench.inference.submit(request, timeout_s, "").record


def text_of(messages: list[Message], index: int = 0) -> str:
    return "".join(output.text for message in messages for output in message.outputs if output.index == index)


def finishes(messages: list[Message]) -> list[FinishReason]:
    return [output.finish for message in messages for output in message.outputs if output.finish]


async def read_all(record: Record, after_seq: int = 0, final_only: bool = False) -> list[Message]:
    with record.attached() as reader:
        return [message async for message in reader.messages(after_seq, final_only)]


async def until(holds: Callable[[], bool]) -> None:
    """Lets other processes, sockets and timers do their part. Raises TimeoutError."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 nothing tells of it
            await asyncio.sleep(0.005)


async def turns(count: int = 20) -> None:
    """Lets the event loop do what it has to do."""
    for _ in range(count):
        await asyncio.sleep(0)
