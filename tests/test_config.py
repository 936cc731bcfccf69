from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent.config import KEYS, LIVE_KEYS, Config, Listen, reload_differences, split_unix_url
from agent.configfile import config_path, load_config
from agent.errors import ConfigError, ConfigUnreadable
from agent.keys import load_secrets

ROOT = Path(__file__).parents[1]
MINIMAL = '[core]\nurl = "https://core.example.com/gateway/v1/"\n'


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("WG_AGENT_") or name.endswith("_DIRECTORY"):
            monkeypatch.delenv(name)


def written(folder: Path, text: str, name: str = "wg0.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def fault(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, text))
    return str(caught.value)


def flat(document: dict[str, Any]) -> dict[str, Any]:
    return {f"{s}.{k}": v for s, values in document.items() for k, v in values.items()}


def shown(value: Any) -> Any:
    """A checked value as it stands in TOML."""
    match value:
        case Path() | Listen():
            return str(value)
        case tuple():
            return [str(item) for item in value]
        case _:
            return value


def test_the_example_shows_every_key_and_no_other() -> None:
    text = (ROOT / "config.example.toml").read_text()
    keys = set(flat(tomllib.loads(re.sub(r"(?m)^#(\w+ = )", r"\1", text))))

    assert keys == set(KEYS)


def test_the_example_shows_each_keys_default(tmp_path: Path) -> None:
    text = (ROOT / "config.example.toml").read_text()
    defaults = load_config(written(tmp_path, MINIMAL))
    # These go by the interface: copied for wg1, the file must not name wg0's.
    active = flat(tomllib.loads(re.sub(r"(?m)^#((?:state|runtime) = )", r"\1", text)))
    assert "paths" not in {section for section, keys in tomllib.loads(text).items() if keys}

    for dotted in KEYS:
        section, _, key = dotted.partition(".")
        default = shown(getattr(getattr(defaults, section), key))
        assert active.get(dotted) == default, dotted


def test_the_example_gives_one_line_of_why_to_every_key() -> None:
    for line in (ROOT / "config.example.toml").read_text().splitlines():
        if re.match(r"#?\w+ = ", line):
            assert re.search(r"\S  ?# \S| +# \S", line), line


def test_the_examples_optional_keys_are_valid_too(tmp_path: Path) -> None:
    text = re.sub(r"(?m)^#(\w+ = )", r"\1", (ROOT / "config.example.toml").read_text())

    config = load_config(written(tmp_path, text), interface="wg0")

    assert config.core.token_file == tmp_path / "core.token"
    assert config.interface.mtu == 1420


def test_the_environment_wins_over_a_credential_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "core.token").write_text("x")
    (credentials / "push.secret").write_text("x")
    path = written(
        tmp_path,
        MINIMAL + 'token_file = "a"\n[push]\nlisten = "[::1]:1"\nsecret_file = "b"\n',
    )
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    monkeypatch.setenv("WG_AGENT_CORE__TOKEN_FILE", "/from/env")

    config = load_config(path)

    assert config.core.token_file == Path("/from/env")
    assert config.push.secret_file == credentials / "push.secret"


@pytest.mark.parametrize(
    ("variable", "text", "section", "key", "value"),
    [
        ("WG_AGENT_STATS__INTERVAL", "5.5", "stats", "interval", 5.5),
        ("WG_AGENT_METRICS__PER_PEER", "false", "metrics", "per_peer", False),
        ("WG_AGENT_HTTP__LISTEN", "[::1]:1234", "http", "listen", Listen("::1", 1234)),
        ("WG_AGENT_LOG__LEVEL", "", "log", "level", "info"),
        ("wg_agent_interface__name", "wg7", "interface", "name", "wg7"),
    ],
)
def test_every_key_can_come_from_the_environment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    text: str,
    section: str,
    key: str,
    value: object,
) -> None:
    monkeypatch.setenv(variable, text)

    config = load_config(written(tmp_path, MINIMAL))

    assert getattr(getattr(config, section), key) == value


def test_addresses_in_the_environment_are_separated_by_commas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WG_AGENT_INTERFACE__ADDRESSES", "10.8.0.1/24, fd00::1/64")

    config = load_config(written(tmp_path, MINIMAL))

    assert [str(a) for a in config.interface.addresses] == ["10.8.0.1/24", "fd00::1/64"]


def test_commands_in_the_environment_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WG_AGENT_HOOKS__PRE_UP", '[["ip", "rule", "add", "fwmark", "1"], ["true"]]')

    config = load_config(written(tmp_path, MINIMAL + '[hooks]\npost_up = [["a", "b c"]]\n'))

    assert config.hooks.pre_up == (("ip", "rule", "add", "fwmark", "1"), ("true",))
    assert config.hooks.post_up == (("a", "b c"),)


@pytest.mark.parametrize(
    "value", ["ip rule add", "[[1]]", '["ip", "rule"]', "[[]]", '[[""]]', '[["a\\u0000"]]']
)
def test_what_is_no_list_of_commands_is_told_what_one_looks_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    quoted = f"'{value}'" if value.startswith("ip") else value
    message = fault(tmp_path, f"{MINIMAL}[hooks]\npre_up = {quoted}\n")
    assert 'line 4: hooks.pre_up: write a list of commands, each a list of words: [["ip", ' in message

    monkeypatch.setenv("WG_AGENT_HOOKS__PRE_UP", value)
    assert "WG_AGENT_HOOKS__PRE_UP: hooks.pre_up: write a list of commands" in fault(tmp_path, MINIMAL)


def test_an_unknown_environment_variable_names_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WG_AGENT_CORE_URL", "x")

    assert "did you mean WG_AGENT_CORE__URL?" in fault(tmp_path, MINIMAL)


def test_a_fault_in_the_environment_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WG_AGENT_STATS__INTERVAL", "often")

    assert "WG_AGENT_STATS__INTERVAL: stats.interval" in fault(tmp_path, MINIMAL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("urll = 1\n", "line 3: unknown key core.urll; did you mean core.url?"),
        ('token = "hunter2"\n', "line 3: unknown key core.token; put the secret in a file"),
        ("[statz]\ninterval = 1\n", "line 3: unknown section [statz]; did you mean [stats]?"),
        ("[log]\nagent_lease = 30\n", "did you mean sessions.agent_lease?"),
        ("[log]\nzzzzqqq = 1\n", "unknown key log.zzzzqqq; remove it"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_its_line(tmp_path: Path, text: str, said: str) -> None:
    message = fault(tmp_path, MINIMAL + text)

    assert said in message
    assert "hunter2" not in message


def test_a_key_outside_of_its_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    assert "did you mean http.listen?" in fault(tmp_path, 'listen = "x"\n' + MINIMAL)


def test_a_section_that_is_a_value_is_a_fault(tmp_path: Path) -> None:
    assert "line 1: stats" in fault(tmp_path, "stats = 3\n" + MINIMAL)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    message = fault(tmp_path, "[stats]\ninterval = 0\n[log]\nlevel = 'loud'\n")

    assert "line 2: stats.interval" in message
    assert "line 4: log.level" in message
    assert "core.url is missing; set it" in message


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("core", "poll_interval"),
        ("core", "timeout"),
        ("sessions", "idle_timeout"),
        ("sessions", "connect_timeout"),
        ("sessions", "max_lifetime"),
        ("stats", "interval"),
        ("hooks", "timeout"),
    ],
)
@pytest.mark.parametrize("value", ["0", "0.99", "-1", "nan", "inf", '"soon"'])
def test_a_duration_is_a_number_of_at_least_one(tmp_path: Path, section: str, key: str, value: str) -> None:
    header = "" if section == "core" else f"[{section}]\n"

    assert f"{section}.{key}" in fault(tmp_path, f"{MINIMAL}{header}{key} = {value}\n")


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("agent_lease", ["0", "30", "30.5"], ["1", "29.9", "-30", "nan"]),
        ("core_lost_grace", ["0", "1", "3600"], ["0.5", "-1", "inf"]),
    ],
)
def test_a_duration_that_can_be_off_is_zero_or_long_enough(
    tmp_path: Path, key: str, good: list[str], bad: list[str]
) -> None:
    for value in good:
        text = f"{MINIMAL}[sessions]\n{key} = {value}\n"
        config = load_config(written(tmp_path, text))
        assert getattr(config.sessions, key) == float(value)
    for value in bad:
        assert f"sessions.{key}" in fault(tmp_path, f"{MINIMAL}[sessions]\n{key} = {value}\n")


@pytest.mark.parametrize(
    "url",
    [
        "https://core.example.com/gateway/v1/",
        "https://core.example.com:8443/",
        "http://127.0.0.1:8080/v1/",
        "http://127.9.9.9/",
        "http://[::1]:8080/v1/",
        "http://localhost/v1/",
        "http+unix:///run/core.sock:/gateway/v1/",
    ],
)
def test_core_is_reached_by_tls_or_on_this_host(tmp_path: Path, url: str) -> None:
    for given in (url, url.removesuffix("/")):
        if given.endswith(":"):
            continue
        config = load_config(written(tmp_path, f'[core]\nurl = "{given}"\n'))
        assert config.core.url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://core.example.com/",
        "http://10.0.0.1/",
        "http://localhost.example.com/",
        "http://127.0.0.1.example.com/",
        "ftp://core.example.com/",
        "core.example.com",
        "https:///gateway/",
        "https://user:hunter2@core.example.com/",
        "https://core.example.com/?token=hunter2",
        "https://core.example.com/#hunter2",
        "https://core.example.com:port/",
        "https://[::1/",
        "https://core example.com/",
        "http+unix://run/core.sock:/v1/",
        "http+unix:///run/core.sock",
        "",
    ],
)
def test_any_other_core_url_is_a_fault_that_does_not_quote_it(tmp_path: Path, url: str) -> None:
    message = fault(tmp_path, f'[core]\nurl = "{url}"\n')

    assert "line 2: core.url" in message
    assert "hunter2" not in message


def test_a_unix_url_has_a_socket_and_a_path() -> None:
    assert split_unix_url("http+unix:///run/core.sock:/gateway/v1/") == (
        "/run/core.sock",
        "/gateway/v1/",
    )
    assert split_unix_url("https://core.example.com/") is None


def test_a_defguard_core_of_generation_1_needs_a_url_and_one_of_2_has_none(tmp_path: Path) -> None:
    first = fault(tmp_path, '[core]\nprotocol = "defguard"\ngeneration = 1\n')
    assert "core.url is missing; set it" in first
    config = load_config(written(tmp_path, '[core]\nprotocol = "defguard"\n'))
    assert config.core.calls
    assert config.cert_dir == config.paths.state / "certs"


def test_a_generation_that_there_is_not_is_a_fault(tmp_path: Path) -> None:
    assert "core.generation" in fault(tmp_path, '[core]\nprotocol = "defguard"\ngeneration = 3\n')


def test_a_core_that_calls_needs_no_token(tmp_path: Path) -> None:
    secrets = load_secrets(load_config(written(tmp_path, '[core]\nprotocol = "defguard"\n')))
    assert secrets.token.get_secret_value() == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('secret_file = "s"\n', "without TLS the push endpoint may listen on loopback only"),
        ('secret_file = "s"\nlisten = "10.0.0.1:1"\n', "on loopback only"),
        ('tls_cert_file = "c"\n', "belong together"),
        ('client_ca_file = "c"\n', "needs TLS"),
    ],
)
def test_push_listens_beyond_loopback_only_with_tls(tmp_path: Path, text: str, said: str) -> None:
    assert said in fault(tmp_path, f"{MINIMAL}[push]\n{text}")


@pytest.mark.parametrize(
    ("text", "enabled"),
    [
        ('secret_file = "s"\nlisten = "127.0.0.1:1"\n', True),
        ('secret_file = "s"\ntls_cert_file = "c"\ntls_key_file = "k"\n', True),
        ("", False),
    ],
)
def test_push_is_on_with_a_secret(tmp_path: Path, text: str, *, enabled: bool) -> None:
    assert load_config(written(tmp_path, f"{MINIMAL}[push]\n{text}")).push.enabled is enabled


def test_a_client_certificate_needs_its_key(tmp_path: Path) -> None:
    assert "belong together" in fault(tmp_path, MINIMAL + 'client_cert_file = "c"\n')


@pytest.mark.parametrize(
    "value",
    ["9586", ":9586", "localhost", "::1:9586", "[::1]", "h:65536", "example.com:80", "1.2.3.4:x"],
)
def test_a_listener_is_an_ip_address_and_a_port(tmp_path: Path, value: str) -> None:
    assert "http.listen" in fault(tmp_path, f'{MINIMAL}[http]\nlisten = "{value}"\n')


@pytest.mark.parametrize("name", ["", "..", "wg/0", "a b", "sixteen-letters-", "wgé"])
def test_an_interface_has_a_name_that_linux_and_paths_take(tmp_path: Path, name: str) -> None:
    assert "interface.name" in fault(tmp_path, f'{MINIMAL}[interface]\nname = "{name}"\n')
    with pytest.raises(ConfigError):
        config_path(name)


@pytest.mark.parametrize("address", ["10.8.0.1/33", "fe80::1%eth0/64", "::ffff:1.2.3.4/128", "x"])
def test_an_interface_address_is_read_strictly(tmp_path: Path, address: str) -> None:
    text = f'{MINIMAL}[interface]\naddresses = ["{address}"]\n'

    assert "interface.addresses" in fault(tmp_path, text)


def test_an_empty_path_is_a_fault(tmp_path: Path) -> None:
    assert "core.ca_file: an empty path" in fault(tmp_path, MINIMAL + 'ca_file = ""\n')


def test_the_interface_given_with_i_names_file_interface_and_folders(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL, "wg3.toml"), interface="wg3")

    assert config_path("wg3") == Path("/etc/wg-agent/wg3.toml")
    assert config.interface.name == "wg3"
    assert config.paths.state == Path("/var/lib/wg-agent/wg3")
    assert config.control_socket == Path("/run/wg-agent/wg3/wg3.sock")
    assert config.private_key_file == Path("/var/lib/wg-agent/wg3/private.key")


def test_a_file_for_another_interface_than_i_is_a_fault(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + '[interface]\nname = "wg0"\n')

    with pytest.raises(ConfigError, match="this file is for wg1"):
        load_config(path, interface="wg1")


def test_systemds_folders_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/s/a:/s/b")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/r")

    config = load_config(written(tmp_path, MINIMAL))

    assert config.paths.state == Path("/s/a")
    assert config.paths.runtime == Path("/r")


def test_relative_paths_count_from_the_files_folder(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL + 'ca_file = "ca.pem"\n[paths]\nstate = "s"\n'))

    assert config.core.ca_file == tmp_path / "ca.pem"
    assert config.paths.state == tmp_path / "s"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"[core\n", "not TOML"),
        (b"\xff", "not UTF-8"),
        (b"#" * (2 << 20), "larger than"),
    ],
)
def test_a_file_that_is_no_configuration_is_told_apart_from_a_faulty_one(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "wg0.toml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigUnreadable, match=said):
        load_config(path)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigUnreadable, match="Is a directory"):
        load_config(tmp_path)


def test_a_configuration_does_not_change(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL))

    with pytest.raises(ValueError, match="frozen"):
        config.stats.interval = 1.0
    with pytest.raises(ValueError, match="frozen"):
        config.stats = config.stats


def test_a_reload_tells_live_keys_from_those_that_need_a_restart(tmp_path: Path) -> None:
    old = load_config(written(tmp_path, MINIMAL))
    new = load_config(
        written(
            tmp_path,
            MINIMAL + "[sessions]\nidle_timeout = 60\n[log]\nlevel = 'debug'\n"
            "[interface]\nlisten_port = 1\n[stats]\ninterval = 30\n",
        )
    )

    assert reload_differences(old, new) == (
        {"sessions.idle_timeout": 60.0, "log.level": "debug"},
        ["interface.listen_port"],
    )
    assert reload_differences(old, old) == ({}, [])


def test_the_live_keys_exist() -> None:
    assert set(KEYS) >= LIVE_KEYS


def test_the_example_marks_the_live_keys() -> None:
    text = (ROOT / "config.example.toml").read_text()
    section, marked = "", set()
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            section = header[1]
        elif (key := re.match(r"#?(\w+) = ", line)) and line.endswith("; live"):
            marked.add(f"{section}.{key[1]}")

    assert marked == LIVE_KEYS


def test_a_configuration_made_without_its_file_needs_core() -> None:
    with pytest.raises(ValueError, match="core"):
        Config()  # type: ignore[call-arg]
