"""What ranks of all kinds do around their role: make the ring, load the model, say they are ready, run the loop."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import TypeAlias

import torch

from ..core.errors import ConfigError
from ..core.frames import WorkerStatus
from ..core.request import Load
from ..engine.continuous_batch import ContinuousBatch
from ..engine.engine import Engine
from ..engine.parallel.follower import Followers
from ..engine.parallel.shared_pool import HostPoolHandle
from ..engine.policies import policy
from ..kv_transfer.capability import RankPool, Site
from ..kv_transfer.inbox import Inbox
from ..kv_transfer.rank_pools import whole_blocks
from ..kv_transfer.transport import Transport
from .config import WorkerConfig
from .gang import OtherRanks, dtype_of, lead
from .lending import Identity
from .loop import Role, StepLoop
from .outbox import Outbox
from .records import Kind, Progress, Ready, Record, encode
from .reporting import Reporter
from .ring import RingFull, RingPair
from .roster import Limits

MakeTransport: TypeAlias = Callable[[Site], AbstractContextManager[Transport]]

_PROGRESS_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """The parts of a rank that a role is built from."""

    config: WorkerConfig
    rings: RingPair
    inbox: Inbox
    engine: Engine
    batch: ContinuousBatch
    transport: Transport
    outbox: Outbox
    reporter: Reporter

    @property
    def identity(self) -> Identity:
        return Identity(self.config.worker_id, self.config.epoch, self.config.inbox)

    @property
    def limits(self) -> Limits:
        return Limits(
            max_waiting=self.config.max_waiting,
            max_model_len=self.engine.max_model_len,
            num_blocks=self.engine.ledger.num_blocks,
            vocab_size=self.engine.config.vocab_size,
        )

    def run(self, role: Role) -> None:
        """Say that we are ready, then step until the service says stop."""
        engine, config = self.engine, self.config
        ready = Ready(
            num_blocks=engine.ledger.num_blocks,
            geometry=engine.geometry,
            vocab_size=engine.config.vocab_size,
            max_model_len=engine.max_model_len,
        )
        status = WorkerStatus(
            worker_id=config.worker_id,
            epoch=config.epoch,
            role=config.role,
            model=config.model_name,
            device=config.device,
            transport=self.transport.name,
            geometry=engine.geometry,
            load=Load(),
        )
        self.rings.outgoing.put(*Record(Kind.READY, 0, encode(ready)).parts())
        StepLoop(
            role,
            self.rings,
            self.inbox,
            self.outbox,
            self.reporter,
            engine.ledger,
            self.transport,
            status,
            self.batch.unused_slots,
        ).run()


@contextmanager
def start(
    config: WorkerConfig, inbox: Inbox, make_transport: MakeTransport, others: OtherRanks | None = None
) -> Iterator[Rank]:
    """others: ranks that hold the other parts of the model. Raises RankLost, ConfigError where the model or its memory
    can't be had as configured."""
    rings = RingPair.for_rank(config.ring_dir, config.ring_name)
    try:
        with lead(config, others) as followers:
            engine = _engine(config, rings, followers)
            if others is not None:
                engine.open_pools(others.pools())
            with make_transport(_site(config, inbox, engine)) as transport:
                yield Rank(
                    config=config,
                    rings=rings,
                    inbox=inbox,
                    engine=engine,
                    batch=_batch(config, engine),
                    transport=transport,
                    outbox=Outbox(rings.outgoing),
                    reporter=Reporter(rings.outgoing),
                )
    finally:
        inbox.wakeup.close()
        rings.unlink()
        rings.close()


def _site(config: WorkerConfig, inbox: Inbox, engine: Engine) -> Site:
    handles = [handle for handle in engine.rank_handles if isinstance(handle, HostPoolHandle)]
    mappable = len(handles) == len(engine.rank_pools)
    return Site(
        worker_id=config.worker_id,
        epoch=config.epoch,
        address=config.inbox,
        inbox=inbox,
        geometry=engine.geometry,
        pool=whole_blocks(engine.rank_pools, engine.rank_heads),
        num_blocks=engine.ledger.num_blocks,
        pools=tuple(
            RankPool(handle.address, heads.start, len(heads))
            for handle, heads in zip(handles, engine.rank_heads, strict=False)
        ),
        unmapped="" if mappable else f"the pool is on {engine.device.type}",
        generations=engine.generations,
        socket=config.ring_dir / f"{config.ring_name}.kv",
        transport=config.transport,
        checked=config.kv_checksums,
    )


def _batch(config: WorkerConfig, engine: Engine) -> ContinuousBatch:
    try:
        chosen = policy(config.policy)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return ContinuousBatch(engine, chosen, step_tokens=config.step_tokens, swap_bytes=config.swap_bytes)


def _engine(config: WorkerConfig, rings: RingPair, followers: Followers | None) -> Engine:
    dtype, due = dtype_of(config), 0.0

    def progress(loaded: int, total: int) -> None:
        nonlocal due
        if monotonic() >= due or loaded == total:
            due = monotonic() + _PROGRESS_S
            with suppress(RingFull):  # nobody reads yet, and the next one says it better
                rings.outgoing.put(*Record(Kind.PROGRESS, 0, encode(Progress(loaded, total))).parts())

    try:
        return Engine.build(
            config.model_dir,
            dtype,
            torch.device(config.device),
            config.kv_bytes,
            config.block_tokens,
            config.max_model_len,
            config.max_batch,
            config.threads,
            progress,
            followers,
            shared=torch.device(config.device).type == "cpu",
            deterministic=config.deterministic,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
