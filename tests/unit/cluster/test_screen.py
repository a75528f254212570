import pytest

from baton.cluster.config import ServeConfig
from baton.cluster.screen import banner


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("127.0.0.1", False, False), ("::1", False, False), ("0.0.0.0", True, False), ("0.0.0.0", False, True)],
)
def test_who_lets_everybody_in_is_told_so(host: str, keys: bool, warned: bool) -> None:
    assert ("set BATON_API_KEYS" in banner(ServeConfig(host=host), "m", keys=keys)) is warned


def test_the_commands_to_try_go_where_it_listens() -> None:
    shown = banner(ServeConfig(host="::", grpc_port=7, http_port=8, tls_cert="c.pem", tls_key="k"), "m", keys=True)
    assert "baton chat --address [::1]:7 --tls-ca c.pem" in shown
    assert 'curl -H "Authorization: Bearer $BATON_API_KEY" https://[::1]:8/v1/models' in shown
