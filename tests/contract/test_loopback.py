from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from baton.kv_transfer.inbox import Inbox
from baton.kv_transfer.loopback import Hub, LoopbackTransport
from baton.kv_transfer.pool import BlockPool

from .transport_contract import End, SnapshotContract, fresh_pool


class TestLoopback(SnapshotContract):
    carrier = "loopback"

    @pytest.fixture
    def ends(self) -> Iterator[tuple[End, End]]:
        hub = Hub()
        with ThreadPoolExecutor(2) as threads:
            found = []
            for name in ("P", "D"):
                pool, inbox = fresh_pool(), Inbox()
                hub.join(name, inbox)
                found.append(End(name, pool, LoopbackTransport(hub, BlockPool(pool), threads), inbox))
            yield found[0], found[1]
