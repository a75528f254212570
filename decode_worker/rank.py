"""The step loop process of a decode worker."""

from ..kv_transfer.by_pair import ray_transport
from ..kv_transfer.inbox import Inbox
from ..worker.config import WorkerConfig
from ..worker.gang import OtherRanks
from ..worker.landing import Landing
from ..worker.rank import MakeTransport, start
from .role import DecodeRole


def run(
    config: WorkerConfig,
    inbox: Inbox,
    make_transport: MakeTransport = ray_transport,
    others: OtherRanks | None = None,
) -> None:
    """Until the service says stop. Blocks; see worker/config.py. Raises ConfigError for what a person must mend."""
    with start(config, inbox, make_transport, others) as rank:
        landing = Landing(
            rank.engine.ledger,
            rank.transport,
            rank.engine.geometry,
            rank.identity,
            lease_s=config.lease_s,
            timeout_s=config.handover_timeout_s,
            wake=inbox.wakeup.ring,
        )
        role = DecodeRole(
            rank.engine,
            rank.batch,
            landing,
            rank.outbox,
            rank.reporter,
            rank.limits,
            ticket_prefix=f"{config.worker_id}.{config.epoch}",
        )
        rank.run(role)
