from pathlib import Path

import pytest

from agent.errors import ConfigError
from agent.sandbox import config

TOKEN = '[[gateways]]\nname = "gw1"\nlocation = "hq"\ntoken = "secret-token"\n'


def load(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "core.toml"
    path.write_text('database = "core.db"\n' + text)
    return config.load(path)


def test_a_file_with_nothing_but_a_database_serves_on_loopback(tmp_path: Path) -> None:
    loaded = load(tmp_path, "")
    assert loaded.listen == ["127.0.0.1:8480"]
    assert (loaded.sessions.lifetime, loaded.mfa.code_lifetime) == (28800, 300)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lisen = []", "lisen"),
        ("[mfa]\nmax_failures = 0", "max_failures"),
        ('[smtp]\nport = "25"', "port"),
        ("database", "not TOML"),
        ("listen = []", "listen is empty"),
        ('listen = ["0.0.0.0:8480"]', "in clear"),
        ('listen = ["127.0.0.1"]', "no address"),
        ('tls_cert_file = "cert.pem"', "tls_key_file"),
        (TOKEN + TOKEN, "one name"),
        ('[[gateways]]\nname = "gw1"\nlocation = "hq"', "has no token"),
        (TOKEN + 'token_file = "also"', "token"),
        (TOKEN + 'push_url = "http://127.0.0.1/v1/changes"', "usable secret"),
        (TOKEN + 'push_url = "http://127.0.0.1/"\npush_secret = "whsec_!"', "usable secret"),
    ],
)
def test_a_faulty_configuration_is_refused_with_what_to_do(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert says in str(error.value)
    assert "secret-token" not in str(error.value)


def test_unix_sockets_and_loopback_need_no_tls(tmp_path: Path) -> None:
    listen = '["unix:/run/core.sock", "[::1]:0", "localhost:1"]'
    assert len(load(tmp_path, f"listen = {listen}").listen) == 3


def test_a_secret_is_not_shown(tmp_path: Path) -> None:
    assert "secret-token" not in repr(load(tmp_path, TOKEN))


def test_a_secret_comes_from_its_file_without_the_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("abc\n")
    assert config.secret(None, str(path), "token") == "abc"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        config.secret(None, str(path), "token")
