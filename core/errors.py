"""Every way to fail. Each error says who acts on it; wire/interceptors.py gives each its gRPC status.

The message of a BatonError is written for the client and reaches it; details belong in the log.
"""


class BatonError(Exception):
    """Base of all that Baton raises on purpose. `retryable`: the router may try another worker."""

    retryable = False

    @property
    def code(self) -> str:
        return type(self).__name__


class InvalidRequest(BatonError):
    """The client mends the request."""


class ContextExceeded(BatonError):
    """Prompt and answer do not fit the model's context; the client shortens them."""


class UnknownModel(BatonError):
    """The client names a model that is served."""


class RequestConflict(BatonError):
    """The client used a request id twice for different requests."""


class UnknownRequest(BatonError):
    """The client asks for a request that is not, or no longer, known."""


class NotAuthenticated(BatonError):
    """The caller brings its API key or cluster token."""


class Overloaded(BatonError):
    """A bound was reached. The router places elsewhere; the client waits and tries again."""

    retryable = True
    retry_after_s = 0.0  # how long the server asks its client to wait


class Unavailable(BatonError):
    """No worker can take it now: none is there, or it drains. The client tries again."""

    retryable = True


class WorkerLost(BatonError):
    """A worker died or its link closed. The router places elsewhere; else the client tries again."""

    retryable = True


class DeadlineExceeded(BatonError):
    """The client's deadline passed."""


class Cancelled(BatonError):
    """The client ended the request."""


class StaleEpoch(BatonError):
    """A message of, or to, an earlier life of a worker. The reader drops it."""


class GeometryMismatch(BatonError):
    """Two workers' KV can't be exchanged. A person mends the deployment."""


class CorruptPiece(BatonError):
    """KV arrived with a wrong checksum. The router may try again."""

    retryable = True


class TransferFailed(BatonError):
    """A piece could not be read from its source. The router may try again."""

    retryable = True


class LeaseExpired(BatonError):
    """The reader did not take the KV in time, so the source took its blocks back. The router may try again."""

    retryable = True


class ModelFault(BatonError):
    """The model computed no numbers to choose a token from. A person looks at the weights, their dtype or the GPU."""


class ConfigError(BatonError):
    """A person mends the configuration; the message says how."""


_BY_CODE = {kind.__name__: kind for kind in BatonError.__subclasses__()}


def from_code(code: str, message: str) -> BatonError:
    """The error that a peer named on the wire. An unknown name is Unavailable, so that it never ends as INTERNAL."""
    return _BY_CODE.get(code, Unavailable)(message)
