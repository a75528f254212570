"""Channels to servers of our own."""

import grpc

from .server import BETWEEN_SERVICES, Limits, window
from .tls import ClientTls


def open_channel(address: str, tls: ClientTls | None = None, limits: Limits = BETWEEN_SERVICES) -> grpc.aio.Channel:
    """A channel with a connection of its own, so that its end is seen by nobody else. Credentials go with each call:
    `tls.bearer`. A dead peer is noticed within keepalive_s + keepalive_timeout_s while a call is open.
    """
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        *window(limits),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.keepalive_time_ms", round(limits.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(limits.keepalive_timeout_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.ping_timeout_ms", round(limits.keepalive_timeout_s * 1000)),  # a keepalive waits for any open ping
        ("grpc.enable_http_proxy", 0),  # services speak to each other directly
    ]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.credentials(), options=options)
