import select
from threading import Thread

import pytest

from baton.core.errors import Overloaded
from baton.core.ids import Epoch, SequenceId, TicketId
from baton.kv_transfer.encoding import encode
from baton.kv_transfer.inbox import Inbox, Wakeup, deliver
from baton.kv_transfer.messages import Delivery, PeerLost, Returned


def message(number: int) -> Returned:
    return Returned(ticket_id=TicketId(str(number)), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1))


def test_messages_come_out_in_order_with_their_handles() -> None:
    inbox = Inbox()
    deliver(inbox, encode(message(1)), ["ref"])
    deliver(inbox, encode(message(2)), [])
    assert [(getattr(item.message, "ticket_id", None), item.handles) for item in inbox.drain()] == [
        ("1", ("ref",)),
        ("2", ()),
    ]
    assert inbox.drain() == []


def test_a_full_inbox_says_so_and_takes_nothing() -> None:
    inbox = Inbox(bound=1)
    deliver(inbox, encode(message(1)), [])
    with pytest.raises(Overloaded):
        deliver(inbox, encode(message(2)), [])
    assert len(inbox.drain()) == 1
    deliver(inbox, encode(message(3)), [])


def test_word_of_a_lost_peer_is_taken_however_full_it_is() -> None:
    inbox = Inbox(bound=1)
    deliver(inbox, encode(message(1)), [])
    inbox.put(Delivery(PeerLost("P")))
    assert [one.message for one in inbox.drain()] == [message(1), PeerLost("P")]


def test_a_message_of_another_thread_wakes_a_sleeper() -> None:
    inbox = Inbox()
    poll = select.poll()
    poll.register(inbox.wakeup.fd, select.POLLIN)
    assert poll.poll(0) == []
    thread = Thread(target=deliver, args=(inbox, encode(message(1)), []))
    thread.start()
    assert poll.poll(30_000)
    thread.join()
    inbox.wakeup.clear()
    assert poll.poll(0) == []


def test_ringing_after_the_close_touches_nobody_elses_descriptor() -> None:
    wakeup = Wakeup()
    wakeup.close()
    other = Wakeup()
    wakeup.ring()
    poll = select.poll()
    poll.register(other.fd, select.POLLIN)
    assert poll.poll(0) == []
    other.close()
