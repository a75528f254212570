"""Names of things. Each kind is its own type, so that a checker notices when two are mixed up."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""What a user asked, as the user or the router named it."""

SequenceId = NewType("SequenceId", str)
"""One answer to a request on the engines: "<request id>/<branch>"."""

TicketId = NewType("TicketId", str)
WorkerId = NewType("WorkerId", str)
Epoch = NewType("Epoch", int)
"""One life of a worker. Compared for equality only, so clocks need not agree."""

BlockId = NewType("BlockId", int)
"""Index of a block in one rank's KV pool."""

BlockKey = NewType("BlockKey", bytes)
"""What a full block holds, the same in every process: see `blocks.py`."""


def sequence_id(request: RequestId, branch: int) -> SequenceId:
    return SequenceId(f"{request}/{branch}")
