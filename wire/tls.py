"""TLS of servers and channels, and the credentials that travel with each call."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """PEM bytes. With `client_ca`, callers must show a certificate signed by it."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None = None

    @classmethod
    def from_files(cls, certificate: Path, key: Path, client_ca: Path | None = None) -> "ServerTls":
        """Raises ConfigError when a file can't be read, or when the key is not the certificate's."""
        for path in (certificate, key):
            read_pem(path)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, _no_password)
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ConfigError(f"TLS certificate {certificate} and key {key} can't be used: {reason}") from None
        return cls(
            certificate=read_pem(certificate), key=read_pem(key), client_ca=read_pem(client_ca) if client_ca else None
        )

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.client_ca, require_client_auth=self.client_ca is not None
        )


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM bytes. Without `ca` the system's authorities are trusted; certificate and key are for servers that ask."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    @classmethod
    def from_files(cls, ca: Path | None, certificate: Path | None = None, key: Path | None = None) -> "ClientTls":
        """Raises ConfigError when a file can't be read."""
        return cls(*(read_pem(path) if path else None for path in (ca, certificate, key)))

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


def _no_password() -> str:
    raise ValueError("the key has a password, which a server can't be asked for")


def read_pem(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS file {path} can't be read: {error.strerror}") from None
    if b"-----BEGIN" not in data:
        raise ConfigError(f"TLS file {path} holds no PEM")
    return data


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that carries an API key or the cluster token; none when it is empty."""
    return (("authorization", f"Bearer {token}"),) if token else ()
