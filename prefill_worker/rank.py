"""The step loop process of a prefill worker."""

from ..kv_transfer.by_pair import ray_transport
from ..kv_transfer.inbox import Inbox
from ..worker.config import WorkerConfig
from ..worker.gang import OtherRanks
from ..worker.lending import Lending
from ..worker.rank import MakeTransport, start
from .role import PrefillRole


def run(
    config: WorkerConfig,
    inbox: Inbox,
    make_transport: MakeTransport = ray_transport,
    others: OtherRanks | None = None,
) -> None:
    """Until the service says stop. Blocks; see worker/config.py. Raises ConfigError for what a person must mend."""
    with start(config, inbox, make_transport, others) as rank:
        lending = Lending(
            rank.engine.ledger,
            rank.transport,
            rank.engine.geometry,
            rank.identity,
            config.lease_s,
            inbox.wakeup.ring,
        )
        role = PrefillRole(
            rank.engine,
            rank.batch,
            lending,
            rank.outbox,
            rank.reporter,
            rank.limits,
            ticket_timeout_s=config.handover_timeout_s,
        )
        rank.run(role)
