"""Step loops of workers in one process, a pair or one that does both, and a router that just drives them."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from baton.colocated_worker.role import ColocatedRole
from baton.core.frames import Command, HandOver, LedgerDump, Release, Report, WorkerStatus
from baton.core.ids import Epoch, SequenceId, WorkerId
from baton.core.request import Ended, EndReason, Load, Request, Sampling, TokenLogprobs
from baton.core.tickets import Ticket
from baton.decode_worker.role import DecodeRole
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.engine import Engine
from baton.engine.policies import policy
from baton.kv_transfer.inbox import Inbox
from baton.kv_transfer.loopback import Hub, LoopbackTransport
from baton.kv_transfer.pool import BlockPool
from baton.prefill_worker.role import PrefillRole
from baton.wire.codec import commands_to_bytes, frame_from_bytes
from baton.wire.worker_codec import ledger_from_bytes, report_from_bytes
from baton.worker.landing import Landing
from baton.worker.lending import Identity, Lending
from baton.worker.loop import Role, StepLoop
from baton.worker.outbox import Outbox
from baton.worker.records import Kind, Record
from baton.worker.reporting import Reporter
from baton.worker.ring import RingPair
from baton.worker.roster import Limits

from .fakes import GEOMETRY, VOCAB, HandCranked, fake_engine

HANDOVER_S = 60.0


class Worker:
    """One rank, and the service's end of its ring."""

    def __init__(
        self,
        folder: Path,
        hub: Hub,
        name: str,
        engine: Engine,
        clock: "Clock",
        *,
        max_waiting: int = 64,
        step_tokens: int = 40,
        swap_bytes: int = 0,
        lookahead: bool = False,
        policy_name: str = "hybrid",
    ) -> None:
        self.engine = engine
        self.rank_rings = RingPair.for_rank(folder, name, 4 << 20)
        self.rings = RingPair.for_service(folder, name)
        self.inbox = Inbox()
        self.crank = HandCranked()
        self.transport = LoopbackTransport(hub, BlockPool(engine.kv_cache.block_bytes_view), self.crank)
        hub.join(name, self.inbox)
        identity = Identity(WorkerId(name), Epoch(1), name)
        outbox, reporter = Outbox(self.rank_rings.outgoing), Reporter(self.rank_rings.outgoing)
        limits = Limits(
            max_waiting=max_waiting,
            max_model_len=engine.max_model_len,
            num_blocks=engine.ledger.num_blocks,
            vocab_size=VOCAB,
        )
        wake = self.inbox.wakeup.ring
        self.batch = batch = ContinuousBatch(
            engine, policy(policy_name), step_tokens=step_tokens, swap_bytes=swap_bytes, lookahead=lookahead
        )
        self.role: Role
        if name.startswith("P"):
            lending = Lending(engine.ledger, self.transport, engine.geometry, identity, 20.0, wake)
            self.role = PrefillRole(
                engine,
                batch,
                lending,
                outbox,
                reporter,
                limits,
                ticket_timeout_s=HANDOVER_S,
            )
        elif name.startswith("B"):
            self.role = ColocatedRole(engine, batch, outbox, reporter, limits)
        else:
            landing = Landing(
                engine.ledger,
                self.transport,
                engine.geometry,
                identity,
                lease_s=20.0,
                timeout_s=HANDOVER_S,
                wake=wake,
            )
            self.role = DecodeRole(engine, batch, landing, outbox, reporter, limits, ticket_prefix=f"{name}.1")
        status = WorkerStatus(
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            role="any",
            model="fake",
            device="cpu",
            transport="loopback",
            geometry=engine.geometry,
            load=Load(),
        )
        self.loop = StepLoop(
            self.role,
            self.rank_rings,
            self.inbox,
            outbox,
            reporter,
            engine.ledger,
            self.transport,
            status,
            batch.unused_slots,
            clock,
        )

    def send(self, *commands: Command, link: int = 1) -> None:
        self.rings.outgoing.put(*Record(Kind.FRAME, link, commands_to_bytes(commands)).parts())

    def put(self, kind: Kind, number: int = 0, body: bytes = b"") -> None:
        self.rings.outgoing.put(*Record(kind, number, body).parts())

    def heard(self) -> list[Record]:
        return [Record.parse(data) for data in self.rings.incoming.take()]

    def ledger(self) -> LedgerDump:
        """Asks as the service does; only when nothing else of interest is on the ring."""
        self.put(Kind.LEDGER, 7, b"drop")
        self.loop.turn()
        (answer,) = (record for record in self.heard() if record.kind is Kind.LEDGER)
        return ledger_from_bytes(answer.body)

    def close(self) -> None:
        self.inbox.wakeup.close()
        self.rings.unlink()
        self.rings.close()
        self.rank_rings.close()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Seen:
    """What a router has got of one sequence."""

    tokens: dict[int, int] = field(default_factory=dict)  # by position
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    ended: dict[str, Ended] = field(default_factory=dict)  # by worker
    ended_in: dict[str, int] = field(default_factory=dict)  # by worker: in which frame of all
    cached: int = 0
    ticket: Ticket | None = None

    def take(self, position: int, token: int) -> None:
        assert position not in self.tokens, "a token came twice"
        self.tokens[position] = token

    @property
    def answer(self) -> list[int]:
        assert sorted(self.tokens) == list(range(len(self.tokens)))
        return [self.tokens[position] for position in sorted(self.tokens)]


class Router:
    """The router's part: takes what its workers say, and keeps it."""

    def __init__(self, clock: Clock, **workers: Worker) -> None:
        self.clock = clock
        self.workers = workers
        self.seen: dict[SequenceId, Seen] = defaultdict(Seen)
        self.parts: list[str] = []
        self.reports: dict[str, Report] = {}  # the last of each worker
        self.preempted: Counter[str] = Counter()  # "swap" and "recompute", as told
        self.frames = 0
        self._numbered: dict[int, SequenceId] = {}

    @staticmethod
    def request(
        name: str,
        prompt: list[int],
        max_tokens: int,
        *,
        stops: frozenset[int] = frozenset(),
        timeout_s: float | None = None,
    ) -> Request:
        """The answer's branch stands behind the name's "/", and is 0 where there is none."""
        sequence_id = SequenceId(name if "/" in name else f"{name}/0")
        return Request(
            sequence_id=sequence_id,
            prompt=tuple(prompt),
            sampling=Sampling(max_tokens=max_tokens, temperature=0.0, stop_token_ids=stops),
            timeout_s=timeout_s,
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )

    def send(self, request: Request, link: int = 1) -> SequenceId:
        """To all workers whom it concerns."""
        if request.number:
            self._numbered[request.number] = request.sequence_id
        for name, worker in self.workers.items():
            if name != "D" or request.sampling.max_tokens > 1:
                worker.send(request, link=link)
        return request.sequence_id

    def admit(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int,
        *,
        link: int = 1,
        stops: frozenset[int] = frozenset(),
        timeout_s: float | None = None,
    ) -> SequenceId:
        return self.send(self.request(name, prompt, max_tokens, stops=stops, timeout_s=timeout_s), link)

    def release(self, key: SequenceId, link: int = 1) -> None:
        for worker in self.workers.values():
            worker.send(Release(sequence_id=key), link=link)

    def close_link(self, link: int) -> None:
        for worker in self.workers.values():
            worker.put(Kind.LINK_CLOSED, link)

    def turn(self) -> bool:
        """One round of everything, the last worker first; False: nothing moved."""
        moved = False
        for worker in reversed(self.workers.values()):
            worked, _ = worker.loop.turn()
            moved |= worked | bool(worker.crank.run())
            moved |= self.hear(worker)
        return moved

    def hear(self, worker: Worker) -> bool:
        return sum(self.take(worker, record) for record in worker.heard()) > 0

    def take(self, worker: Worker, record: Record) -> bool:
        """What a router does with one record; False: it says nothing of a sequence."""
        (name,) = (name for name, one in self.workers.items() if one is worker)
        if record.kind is Kind.REPORT:
            report = self.reports[name] = report_from_bytes(record.body)
            self.parts += [part.name for part in report.parts]
            self.preempted.update(swap=report.preempted_swap, recompute=report.preempted_recompute)
        if record.kind is not Kind.FRAME:
            return False
        frame = frame_from_bytes(record.body)
        self.frames += 1
        for granted in frame.tickets:
            self.seen[granted.sequence_id].ticket = granted.ticket
            self.workers["P"].send(HandOver(sequence_id=granted.sequence_id, ticket=granted.ticket), link=record.number)
        for tokens in frame.tokens:
            seen = self.seen[tokens.sequence_id]
            seen.cached += tokens.cached_tokens
            seen.logprobs += tokens.logprobs
            seen.prompt_logprobs += tokens.prompt_logprobs
            for i, token in enumerate(tokens.token_ids):
                seen.take(tokens.first_position + i, token)
        if frame.step is not None:
            for number, position, token in zip(
                frame.step.numbers, frame.step.positions, frame.step.token_ids, strict=True
            ):
                self.seen[self._numbered[number]].take(position, token)
        for ended in frame.ended:
            seen = self.seen[ended.sequence_id]
            assert name not in seen.ended, f"{name} ended {ended.sequence_id} twice"
            seen.ended[name] = ended
            seen.ended_in[name] = self.frames
            other = {"P": "D", "D": "P"}.get(name)
            over = (EndReason.STOP, EndReason.LENGTH, EndReason.FAILED) if name == "P" else (EndReason.FAILED,)
            if other is not None and ended.reason in over:
                self.workers[other].send(Release(sequence_id=ended.sequence_id), link=record.number)
        return bool(frame.tickets or frame.tokens or frame.step or frame.ended)

    def settle(self, rounds: int = 600) -> None:
        """Until three rounds in a row move nothing."""
        quiet = 0
        for _ in range(rounds):
            quiet = 0 if self.turn() else quiet + 1
            if quiet == 3:
                return
        raise AssertionError("the workers never come to rest")

    def assert_clean(self) -> None:
        for worker in self.workers.values():
            dump = worker.ledger()
            assert dump.violations == ()
            assert dump.holders == ()
            assert (dump.free_blocks, dump.held_blocks, dump.lent_blocks) == (dump.total_blocks, 0, 0)
            assert dump.transport_objects == 0
            worker.engine.ledger.check()

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


class Pair(Router):
    """A prefill worker P and a decode worker D on one hub."""

    def __init__(
        self,
        folder: Path,
        *,
        prefill_blocks: int = 64,
        decode_blocks: int = 64,
        max_waiting: int = 64,
        swap_blocks: int = 0,
        lookahead: bool = False,
    ) -> None:
        clock, hub = Clock(), Hub()
        self.p = Worker(
            folder, hub, "P", fake_engine(prefill_blocks), clock, max_waiting=max_waiting, lookahead=lookahead
        )
        self.d = Worker(
            folder,
            hub,
            "D",
            fake_engine(decode_blocks),
            clock,
            max_waiting=max_waiting,
            swap_bytes=swap_blocks * GEOMETRY.block_bytes,
            lookahead=lookahead,
        )
        super().__init__(clock, P=self.p, D=self.d)


class Alone(Router):
    """A worker B that does both."""

    def __init__(
        self,
        folder: Path,
        *,
        blocks: int = 64,
        max_batch: int = 8,
        max_waiting: int = 64,
        swap_blocks: int = 0,
        lookahead: bool = False,
        policy_name: str = "hybrid",
    ) -> None:
        clock = Clock()
        self.b = Worker(
            folder,
            Hub(),
            "B",
            fake_engine(blocks, max_batch=max_batch),
            clock,
            max_waiting=max_waiting,
            swap_bytes=swap_blocks * GEOMETRY.block_bytes,
            lookahead=lookahead,
            policy_name=policy_name,
        )
        super().__init__(clock, B=self.b)
