"""How both clients reach the router: one channel's options, credentials and metadata."""

import grpc

from ..core.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1:50051"
_MESSAGE_BYTES = 64 << 20  # a prompt of a few million tokens
OPTIONS = (
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),  # a dead router is noticed also while a prompt is computed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 0),  # ours know how far a stream got
)


def metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def credentials(tls_ca: bytes | None) -> grpc.ChannelCredentials | None:
    """None: plain text. Raises ConfigError when the certificate is none."""
    if tls_ca is None:
        return None
    if b"-----BEGIN CERTIFICATE-----" not in tls_ca:
        raise ConfigError("The TLS certificate is not in PEM form.")
    return grpc.ssl_channel_credentials(root_certificates=tls_ca)
