from __future__ import annotations

import base64
import hashlib
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.config import Config, Core, Interface, Paths, Push
from agent.configfile import load_config
from agent.curve25519 import clamp, public_key
from agent.encoding import format_key
from agent.errors import ConfigError
from agent.keys import (
    certificate_expiries,
    check_private_key_storable,
    load_private_key,
    load_secrets,
    read_secret_file,
    store_private_key,
)

PUSH_SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


def secret(folder: Path, name: str, content: str, mode: int = 0o600) -> Path:
    path = folder / name
    path.write_text(content)
    path.chmod(mode)
    return path


def config(folder: Path, **core: Path) -> Config:
    return Config(
        core=Core(url="https://core.example.com/", **core),  # type: ignore[arg-type]
        paths=Paths(state=folder / "state", runtime=folder / "run"),
    )


def test_a_token_is_read_without_its_line_end(tmp_path: Path) -> None:
    secrets = load_secrets(config(tmp_path, token_file=secret(tmp_path, "t", "abc.DEF-1\n")))

    assert secrets.token.get_secret_value() == "abc.DEF-1"
    assert secrets.push_secret is None
    assert "abc" not in repr(secrets)


@pytest.mark.parametrize("content", ["two words", "a\nb", "é", "\x00", ""])
def test_what_cannot_be_a_header_is_no_token_and_is_not_quoted(tmp_path: Path, content: str) -> None:
    path = secret(tmp_path, "t", "hunter2 " + content if content else "")

    with pytest.raises(ConfigError, match=r"core\.token_file") as caught:
        load_secrets(config(tmp_path, token_file=path))

    assert "hunter2" not in str(caught.value)


def test_a_missing_token_says_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set core\.token_file"):
        load_secrets(config(tmp_path))
    with pytest.raises(ConfigError, match="No such file"):
        load_secrets(config(tmp_path, token_file=tmp_path / "none"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601, 0o777])
def test_a_secret_file_that_others_may_touch_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    path = secret(tmp_path, "t", "x", mode)

    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600 {path}"):
        read_secret_file(path, "core.token_file")


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_secret_file_of_its_owner_alone_is_read(tmp_path: Path, mode: int) -> None:
    assert read_secret_file(secret(tmp_path, "t", "x", mode), "k") == b"x"


def test_a_credential_may_show_systemds_acl_as_group_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    assert read_secret_file(secret(tmp_path, "core.token", "x", 0o440), "k") == b"x"
    for mode in (0o444, 0o460):
        with pytest.raises(ConfigError, match="chmod"):
            read_secret_file(secret(tmp_path, "core.token", "x", mode), "k")


def test_a_secret_that_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a file"):
        read_secret_file(tmp_path, "k")
    with pytest.raises(ConfigError, match="too large"):
        read_secret_file(secret(tmp_path, "t", "x" * 70_000), "k")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_an_unreadable_secret_says_why(tmp_path: Path) -> None:
    path = secret(tmp_path, "t", "x")
    pid = os.fork()
    if pid == 0:
        try:
            for folder in (tmp_path, *tmp_path.parents[:-2]):
                folder.chmod(folder.stat().st_mode | 0o001)
            os.setuid(65534)
            read_secret_file(path, "core.token_file")
        except ConfigError as error:
            os._exit(0 if "Permission denied" in str(error) and "LoadCredential" in str(error) else 1)
        finally:
            os._exit(2)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_push_secret_is_in_the_form_of_standard_webhooks(tmp_path: Path) -> None:
    def with_secret(content: str) -> Config:
        return Config(
            core=Core(url="https://core.example.com/", token_file=secret(tmp_path, "t", "x")),
            push=Push(
                listen="127.0.0.1:0",  # type: ignore[arg-type]
                secret_file=secret(tmp_path, "s", content),
            ),
        )

    loaded = load_secrets(with_secret(PUSH_SECRET + "\n")).push_secret

    assert loaded is not None
    assert loaded.get_secret_value() == PUSH_SECRET
    for bad in ("whsec_c2hvcnQ=", "whsec_!!!", PUSH_SECRET[:-1], "not base64 at all, but long enough"):
        with pytest.raises(ConfigError, match="whsec_") as caught:
            load_secrets(with_secret(bad))
        assert bad not in str(caught.value)


@pytest.mark.parametrize("key", ["ca_file", "client_cert_file", "client_key_file"])
def test_a_missing_certificate_file_is_named(tmp_path: Path, key: str) -> None:
    files = {"token_file": secret(tmp_path, "t", "x")}
    if key.startswith("client"):
        files["client_cert_file"] = secret(tmp_path, "c", "x")
        files["client_key_file"] = secret(tmp_path, "k", "x")

    with pytest.raises(ConfigError, match=rf"core\.{key}: .*No such file"):
        load_secrets(config(tmp_path, **(files | {key: tmp_path / "none"})))


def test_a_loose_client_key_is_refused(tmp_path: Path) -> None:
    files = {
        "token_file": secret(tmp_path, "t", "x"),
        "client_cert_file": secret(tmp_path, "c", "x", 0o644),
        "client_key_file": secret(tmp_path, "k", "x", 0o640),
    }

    with pytest.raises(ConfigError, match=r"core\.client_key_file.*chmod 600"):
        load_secrets(config(tmp_path, **files))


def test_a_private_key_is_made_once_and_then_kept(tmp_path: Path) -> None:
    first = load_private_key(config(tmp_path), create=True)
    path = tmp_path / "state" / "private.key"

    assert load_private_key(config(tmp_path), create=True) == first
    assert path.read_text() == format_key(first) + "\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    assert clamp(first) == first


def test_a_private_key_is_not_made_for_a_look(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_private_key(config(tmp_path), create=False)

    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("content", ["x", format_key(bytes(32)), "A" * 43, "A" * 43 + "B"])
def test_what_is_no_key_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = secret(tmp_path, "key", content)
    given = Config(core=Core(url="https://core.example.com/"), interface=Interface(private_key_file=path))

    with pytest.raises(ConfigError, match="wg genkey"):
        load_private_key(given, create=True)

    assert path.read_text() == content


def test_a_private_key_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")

    with pytest.raises(ConfigError, match="name a file that the agent may write"):
        load_private_key(config(tmp_path), create=True)


@pytest.mark.parametrize("seed", [0, 1, 2, 0xFF])
def test_a_public_key_is_what_x25519_makes_of_the_private_one(seed: int) -> None:
    raw = hashlib.sha256(bytes([seed])).digest() if seed != 0xFF else b"\xff" * 32

    expected = X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw()

    assert public_key(raw) == expected


def test_a_key_that_core_is_to_replace_lies_where_the_agent_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "wg0.toml"
    path.write_text(f'[core]\nprotocol = "defguard"\n[interface]\nprivate_key_file = "{tmp_path}/key"\n')
    config = load_config(path)
    monkeypatch.setattr("agent.keys.os.access", lambda *_: False)
    check_private_key_storable(config)  # there is none yet: making it says what is wrong
    store_private_key(tmp_path / "key", clamp(bytes(range(32))))
    with pytest.raises(ConfigError, match="can't be replaced") as caught:
        check_private_key_storable(config)
    assert "leave interface.private_key_file" in caught.value.hint


def test_another_key_takes_the_place_of_the_one_before_whole_and_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    keys = [clamp(bytes([number]) * 32) for number in (1, 2)]
    for raw in keys:
        store_private_key(path, raw)
        assert path.read_text() == format_key(raw) + "\n"
        assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


def test_of_a_chain_the_first_end_counts_of_authorities_the_last(tmp_path: Path) -> None:
    ends = [datetime(year, 1, 1, tzinfo=UTC) for year in (2031, 2029, 2030)]
    authorities = [trustme.CA() for _ in ends]
    leaves = [ca.issue_cert("gw1", not_after=end) for ca, end in zip(authorities, ends, strict=True)]
    chain = tmp_path / "chain.pem"
    chain.write_bytes(b"".join(leaf.cert_chain_pems[0].bytes() for leaf in leaves))
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(chain.read_bytes())
    key = secret(tmp_path, "key.pem", "a key")
    held = Config(
        core=Core(url="https://c/", ca_file=bundle, client_cert_file=chain, client_key_file=key),
        push=Push(tls_cert_file=chain, tls_key_file=key, client_ca_file=bundle),
    )

    assert certificate_expiries(held) == {
        "core.ca": ends[0].timestamp(),
        "core.client_cert": ends[1].timestamp(),
        "push.tls_cert": ends[1].timestamp(),
        "push.client_ca": ends[0].timestamp(),
    }


def test_a_file_without_a_certificate_has_no_end(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("nothing")
    missing = Config(core=Core(url="https://c/", ca_file=tmp_path / "missing"))

    assert certificate_expiries(missing) == {}
    assert certificate_expiries(Config(core=Core(url="https://c/", ca_file=empty))) == {}
