"""Whose account a request goes to: the API key that came with it, by a digest."""

from hashlib import blake2b

TENANT_BYTES = 8


def tenant_of(authorization: str) -> str:
    """The name of the tenant behind "Bearer <key>": 16 hexadecimal digits, the same at every router and after every
    start; the key itself goes no further than the door. "" where there is no key. The caller has looked at the key."""
    _, _, key = authorization.partition(" ")
    return blake2b(key.encode(), digest_size=TENANT_BYTES, person=b"baton.tenant").hexdigest() if key else ""
