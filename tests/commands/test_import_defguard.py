from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.__main__ import main
from agent.commands.defguard_options import VARIABLES, carry_over
from agent.commands.import_defguard import _lines
from agent.commands.tomltext import TomlValue, toml_value
from agent.config import Config, Hooks
from agent.configfile import load_config
from agent.hooks import _expanded
from tests.commands.parts import wg_agent

TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJERUZHVUFSRC1ORVRXT1JLLTEifQ.c2lnbmF0dXJl"
ONE = {"token": TOKEN, "grpc_url": "https://core.example.com:50055"}


@dataclass
class Imported:
    """What the command did."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def config(self) -> Config:
        """What the agent makes of what was printed."""
        path = self.folder / "printed.toml"
        path.write_text(self.out)
        return load_config(path)

    @property
    def document(self) -> dict[str, Any]:
        return tomllib.loads(self.out)

    def told(self, heading: str) -> list[str]:
        """The items below a heading of the comments, each on one line."""
        items: list[str] = []
        lines = iter(self.out.splitlines())
        for line in lines:
            if line == f"# {heading}":
                break
        for line in lines:
            if line.startswith("# - "):
                items.append(line[4:])
            elif line.startswith("#   "):
                items[-1] += " " + line[4:]
            else:
                break
        return items

    @property
    def todo(self) -> list[str]:
        return self.told("Left for you to do:")

    @property
    def without_counterpart(self) -> dict[str, str]:
        parts = (item.partition(": ") for item in self.told("Without a counterpart:"))
        return {option: why for option, _, why in parts}


Import = Callable[..., Imported]


@pytest.fixture
def imports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Import:
    """Import options from a file of theirs, or text that is one."""

    def run(options: Mapping[str, TomlValue] | str, *more: str) -> Imported:
        text = options if isinstance(options, str) else written(options)
        path = tmp_path / "gateway.toml"
        path.write_text(text)
        code = main(["import-defguard", str(path), *more])
        out, err = capsys.readouterr()
        return Imported(code, out, err, tmp_path)

    return run


@pytest.fixture
def imports_env(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Import:
    def run(text: str, *more: str) -> Imported:
        path = tmp_path / "gateway.env"
        path.write_text(text)
        code = main(["import-defguard", "--env", str(path), *more])
        out, err = capsys.readouterr()
        return Imported(code, out, err, tmp_path)

    return run


def written(options: Mapping[str, TomlValue]) -> str:
    return "".join(f"{toml_value(key)} = {toml_value(value)}\n" for key, value in options.items())


# What is carried over.


def test_a_gateway_of_generation_1_is_carried_over_whole(imports: Import, tmp_path: Path) -> None:
    done = imports(
        {
            **ONE,
            "grpc_ca": "/etc/defguard/ca.pem",
            "userspace": True,
            "stats_period": 15,
            "ifname": "wg7",
            "health_port": 8081,
            "http_bind_address": "10.1.2.3",
            "masquerade": True,
            "fw_priority": -10,
            "disable_firewall_management": True,
            "log_level": "warn",
            "pre-up": "ip rule add fwmark 1",
            "post_up": "touch  /run/up",
            "pre_down": "a b",
            "post-down": "c",
        },
        "--token-file",
        str(tmp_path / "core.token"),
    )

    assert (done.code, done.err, done.todo, done.without_counterpart) == (0, "", [], {})
    config = done.config
    assert (config.core.protocol, config.core.generation) == ("defguard", 1)
    assert config.core.url == "https://core.example.com:50055/"
    assert config.core.token_file == tmp_path / "core.token"
    assert config.core.ca_file == Path("/etc/defguard/ca.pem")
    assert (config.interface.name, config.interface.backend) == ("wg7", "userspace")
    assert config.stats.interval == 15
    assert str(config.http.listen) == "10.1.2.3:8081"
    assert (config.firewall.masquerade, config.firewall.priority, config.firewall.acl) == (True, -10, False)
    assert config.log.level == "warning"
    assert config.hooks == Hooks(
        pre_up=(("ip", "rule", "add", "fwmark", "1"),),
        post_up=(("touch", "/run/up"),),
        pre_down=(("a", "b"),),
        post_down=(("c",),),
    )


def test_a_gateway_of_generation_2_is_carried_over_whole(imports: Import) -> None:
    done = imports({"grpc_port": 50099, "cert_dir": "/srv/certs", "adoption_timeout": 5, "userspace": False})

    assert (done.code, done.err, done.todo) == (0, "", [])
    config = done.config
    assert (config.core.protocol, config.core.generation, config.core.url) == ("defguard", 2, "")
    assert str(config.defguard.listen) == "0.0.0.0:50099"
    assert config.defguard.cert_dir == Path("/srv/certs")
    assert config.defguard.adoption_timeout == 300
    assert config.interface.backend == "auto"


@pytest.mark.parametrize("options", [ONE, {}])
def test_what_they_leave_to_their_defaults_is_left_to_ours(
    imports: Import, options: dict[str, TomlValue]
) -> None:
    config = imports(options).config

    defaults = Config(core=config.core)
    for section in ("stats", "http", "firewall", "hooks", "log", "sessions"):
        assert getattr(config, section) == getattr(defaults, section)
    assert config.interface.name == "wg0"
    # Theirs are in a folder of their own, also where that is not said.
    assert config.defguard.cert_dir == (None if options else Path("/etc/defguard/certs"))
    assert config.defguard == defaults.defguard.model_copy(update={"cert_dir": config.defguard.cert_dir})


def test_each_option_that_has_no_counterpart_is_named_with_the_reason(imports: Import) -> None:
    done = imports(
        {
            "pidfile": "/run/x.pid",
            "use_syslog": False,
            "syslog_facility": "LOG_USER",
            "syslog_socket": "/var/run/log",
            "grpc_cert": "/etc/defguard/certs/gateway_grpc_cert.pem",
            "grpc_key": "/etc/defguard/certs/gateway_grpc_key.pem",
            "name": "gw",
            "grpc_ca": "/ca.pem",
            "http_bind_address": "::",
        }
    )

    assert done.code == 0
    journal = "the agent logs to stderr, and systemd's journal takes that"
    assert done.without_counterpart == {
        "pidfile": "systemd knows the agent's process",
        "use_syslog": journal,
        "syslog_facility": journal,
        "syslog_socket": journal,
        "grpc_cert": "it is always gateway_grpc_cert.pem in defguard.cert_dir",
        "grpc_key": "it is always gateway_grpc_key.pem in defguard.cert_dir",
        "name": "there is no such thing in generation 2 of the protocol",
        "grpc_ca": "it has no use in generation 2",
        "http_bind_address": "without health_port there is nothing that it is for",
    }


def test_certificates_that_lie_elsewhere_are_to_be_copied(imports: Import) -> None:
    done = imports({"grpc_cert": "/etc/ssl/a.pem", "cert_dir": "/srv/certs"})

    assert done.code == 1
    assert done.todo == [
        "grpc_cert: copy /etc/ssl/a.pem to /srv/certs/gateway_grpc_cert.pem: files there have fixed names"
    ]


def test_options_of_both_generations_are_named(imports: Import) -> None:
    done = imports({**ONE, "grpc_port": 50066, "name": "gw"})

    assert done.config.core.generation == 1
    assert done.without_counterpart["grpc_port"] == "it has no use in generation 1"
    assert done.without_counterpart["name"].endswith("see defguard.hostname")
    assert any("of both generations" in item for item in done.told("Not quite the same:"))


def test_unknown_options_are_named_and_their_values_are_not_shown(imports: Import) -> None:
    done = imports('grpc-port = 3\npassword = "hunter2"\n[nested]\ntoken = "hunter2"\n')

    unknown = "no option of Defguard's gateway that is known here"
    assert done.without_counterpart == {"grpc-port": unknown, "password": unknown, "nested": unknown}
    assert "hunter2" not in done.out + done.err
    assert done.config.core.generation == 2


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("stats_period", 0, "stats_period: not taken for stats.interval"),
        ("stats_period", "often", "stats_period: not carried over: it is no whole number"),
        ("stats_period", True, "stats_period: not carried over: it is no whole number"),
        ("adoption_timeout", 0, "adoption_timeout: not taken for defguard.adoption_timeout"),
        ("grpc_port", 70_000, "grpc_port: not taken for defguard.listen"),
        ("ifname", "sixteen-letters-", "ifname: not taken for interface.name"),
        ("ifname", 3, "ifname: not carried over: it is no text"),
        ("userspace", "perhaps", "userspace: not carried over: it is neither true nor false"),
        ("masquerade", 7, "masquerade: not carried over: it is neither true nor false"),
        ("fw_priority", 401, "fw_priority: not taken for firewall.priority"),
        ("log_level", "loud", "log_level: not taken for log.level"),
        ("pre_up", ["ip", "rule"], "pre_up: not carried over: it is no text"),
        ("health_port", 65_536, "health_port: not taken for http.listen"),
    ],
)
def test_a_value_that_ours_does_not_take_is_left_out_and_named(
    imports: Import, option: str, value: TomlValue, said: str
) -> None:
    done = imports({option: value})

    assert done.code == 1
    assert len(done.todo) == 1
    assert done.todo[0].startswith(said)
    assert f"wg-agent: {done.todo[0]}" in done.err
    assert done.config == imports({}).config


def test_a_health_endpoint_without_an_address_is_reached_from_everywhere(imports: Import) -> None:
    for address, listen in ((None, "0.0.0.0:8081"), ("::1", "[::1]:8081"), ("[::1]", "[::1]:8081")):
        more = {} if address is None else {"http_bind_address": address}
        done = imports({"health_port": 8081, **more})
        assert str(done.config.http.listen) == listen
        assert "/readyz" in str(done.told("Not quite the same:"))
    assert imports({"health_port": 8081, "http_bind_address": "localhost"}).code == 1


# Where core is.


@pytest.mark.parametrize(
    "url", ["http://core.example.com:50055", "http://10.0.0.1:50055/", "http://[fd00::1]"]
)
def test_plain_http_to_another_host_is_left_to_the_operator(imports: Import, url: str) -> None:
    done = imports({"token": TOKEN, "grpc_url": url})

    assert done.code == 1
    assert "url" not in done.document["core"]
    assert (
        f'#url = "{url}"  # refused: it would send every session\'s key in the clear' in done.out.splitlines()
    )
    assert "pre-shared keys of all sessions" in done.err
    # With one that is taken, the rest is right.
    done.out = done.out.replace(f'#url = "{url}"', 'url = "https://core.example.com/"')
    assert done.config.core.generation == 1


def test_plain_http_to_this_host_is_carried_over(imports: Import) -> None:
    done = imports({"token": TOKEN, "grpc_url": "http://127.0.0.1:50055"})

    assert done.config.core.url == "http://127.0.0.1:50055/"


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@core.example.com",
        "http://user:hunter2@core.example.com",
        "http://core.example.com/?key=hunter2",
        "http://core.example.com/hunter2",
        "https://core.example.com/#hunter2",
        "hunter2",
        "http://[::1hunter2",
        "https://core\nhunter2",
    ],
)
def test_what_is_no_url_of_core_is_not_shown(imports: Import, url: str) -> None:
    done = imports({"token": TOKEN, "grpc_url": url})

    assert done.code == 1
    assert "url" not in done.document["core"]
    assert any(item.startswith("grpc_url: ") for item in done.todo)
    assert "hunter2" not in done.out + done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token": TOKEN}, "grpc_url: it is not set: set core.url"),
        (
            {"grpc_url": "https://c/"},
            "token: there is none: put the one that core shows into /etc/wg-agent/wg0.token",
        ),
        (
            {"grpc_url": "https://c/", "token": "two words"},
            "token: it is no token of core's, which has no spaces",
        ),
    ],
)
def test_what_generation_1_lacks_is_to_be_done(
    imports: Import, options: dict[str, TomlValue], said: str
) -> None:
    done = imports(options)

    assert done.code == 1
    assert any(item.startswith(said) for item in done.todo)


# The token.


def test_the_token_is_written_to_a_new_file_of_its_owners_and_nowhere_else(
    imports: Import, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        done = imports(ONE, "--token-file", str(tmp_path / "t"))
    finally:
        os.umask(before)

    assert (tmp_path / "t").read_text() == TOKEN + "\n"
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o600
    assert done.config.core.token_file == tmp_path / "t"
    assert TOKEN not in done.out + done.err


def test_without_a_file_for_the_token_it_is_said_how_to_store_it(imports: Import) -> None:
    done = imports({**ONE, "ifname": "wg3"})

    assert done.code == 1
    assert str(done.config.core.token_file) == "/etc/wg-agent/wg3.token"
    assert "run this again with --token-file /etc/wg-agent/wg3.token" in done.todo[0]
    assert TOKEN not in done.out + done.err


def test_a_file_that_is_there_is_not_written_over(imports: Import, tmp_path: Path) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_text("mine")
    link.symlink_to(tmp_path / "elsewhere")

    for path in (there, link):
        done = imports(ONE, "--token-file", str(path))
        assert (done.code, done.out) == (2, "")
        assert f"{path} is there already" in done.err
    assert there.read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()

    done = imports(ONE, "--token-file", str(tmp_path / "no" / "folder"))
    assert (done.code, done.out) == (2, "")


def test_a_file_for_a_token_that_is_not_there_is_a_usage_error(imports: Import, tmp_path: Path) -> None:
    done = imports({}, "--token-file", str(tmp_path / "t"))

    assert (done.code, done.out) == (2, "")
    assert not (tmp_path / "t").exists()


def test_an_option_that_holds_the_token_is_left_out(imports: Import) -> None:
    done = imports({**ONE, "post_up": f"curl -d {TOKEN} http://127.0.0.1/", TOKEN: 1})

    assert TOKEN not in done.out + done.err
    assert done.config.hooks == Hooks()
    assert done.todo.count("an option that holds the token was left out: only token may") == 2


# Commands.


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("iptables -A FORWARD ; echo", ["iptables", "-A", "FORWARD", ";", "echo"]),
        ("echo $HOME", ["echo", "$HOME"]),
        ("/bin/sh -c true", ["/bin/sh", "-c", "true"]),
        ("bash -e -c true", ["bash", "-e", "-c", "true"]),
    ],
)
def test_a_command_for_a_shell_is_carried_over_as_it_is_split_with_a_warning(
    imports: Import, command: str, words: list[str]
) -> None:
    done = imports({"post_up": command})

    assert done.config.hooks.post_up == (tuple(words),)
    assert "# post_up: it looks as if written for a shell." in done.out
    assert any(item.startswith("post_up: ") for item in done.told("Not quite the same:"))


def test_a_script_for_a_shell_is_shown_as_it_was_perhaps_meant(imports: Import) -> None:
    done = imports({"post_up": "/bin/sh -c 'a | b'"})

    assert done.config.hooks.post_up == (("/bin/sh", "-c", "'a", "|", "b'"),)
    assert '# perhaps it was meant as: post_up = [["/bin/sh", "-c", "a | b"]]' in done.out.splitlines()
    assert "perhaps" not in imports({"post_up": "/bin/sh -c 'a"}).out


def test_a_plain_command_has_no_warning(imports: Import) -> None:
    done = imports({"post_up": "ip route add 10.0.0.0/8 dev wg0"})

    assert (done.code, done.told("Not quite the same:")) == (0, [])
    assert imports({"post_up": " \t"}).config.hooks == Hooks()


@given(
    st.lists(
        st.text(st.sampled_from("%i d"), min_size=1).map(lambda t: t.replace(" ", "")).filter(bool),
        min_size=1,
    )
)
def test_words_with_percent_signs_stay_what_they_were(words: list[str]) -> None:
    (line,) = carry_over({"post_up": " ".join(words)}).sections["hooks"]

    assert isinstance(line.value, list)
    assert [_expanded(str(word), "wg0") for word in line.value[0]] == words


# Where it comes from.


def test_an_environment_file_sets_each_option(imports_env: Import, tmp_path: Path) -> None:
    done = imports_env(
        f"""# a comment
DEFGUARD_TOKEN="{TOKEN}"
export DEFGUARD_GRPC_URL='https://core.example.com:50055'

DEFGUARD_USERSPACE=true
DEFGUARD_STATS_PERIOD=15
DEFGUARD_MASQUERADE=1
DEFGUARD_DISABLE_FW_MGMT=false
DEFGUARD_FW_PRIORITY=-5
HEALTH_PORT=8081
PRE_UP=ip rule add $X
DEFGUARD_IFNAME=
RUST_LOG=debug
""",
        "--token-file",
        str(tmp_path / "t"),
    )

    assert (done.code, done.todo) == (0, [])
    config = done.config
    assert config.core.url == "https://core.example.com:50055/"
    assert (config.interface.name, config.interface.backend) == ("wg0", "userspace")
    assert config.stats.interval == 15
    assert (config.firewall.masquerade, config.firewall.priority, config.firewall.acl) == (True, -5, True)
    assert config.http.listen.port == 8081
    assert config.hooks.pre_up == (("ip", "rule", "add", "$X"),)
    assert done.without_counterpart == {"RUST_LOG": "no variable of Defguard's gateway that is known here"}
    assert (tmp_path / "t").read_text() == TOKEN + "\n"


def test_beside_a_file_the_environment_does_not_count_and_that_is_said(
    imports: Import, tmp_path: Path
) -> None:
    env = tmp_path / "env"
    env.write_text(f"DEFGUARD_TOKEN={TOKEN}\nDEFGUARD_IFNAME=wg9\n")

    done = imports({"ifname": "wg1"}, "--env", str(env))

    assert done.code == 0
    assert (done.config.interface.name, done.config.core.generation) == ("wg1", 2)
    comments = " ".join(line.removeprefix("# ") for line in done.out.splitlines())
    assert f"{env} was not used" in comments
    assert "It sets: DEFGUARD_TOKEN, DEFGUARD_IFNAME." in comments
    assert TOKEN not in done.out + done.err


def test_the_variables_set_options_that_there_are(imports: Import) -> None:
    unknown = "no option of Defguard's gateway that is known here"

    done = imports(dict.fromkeys(VARIABLES.values(), "1"))

    assert unknown not in done.without_counterpart.values()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't be read: No such file or directory"),
        (b"token = hunter2", "not TOML"),
        (b"\xff", "is not UTF-8"),
        (b"#" * (2 << 20), "larger than"),
        (b'pre_up = "a"\npre-up = "b"\n', "pre_up is set twice"),
    ],
)
def test_what_cannot_be_read_ends_with_2_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
) -> None:
    path = tmp_path / "gateway.toml"
    if content is not None:
        path.write_bytes(content)

    assert main(["import-defguard", str(path)]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "hunter2" not in err


def test_an_environment_file_with_a_line_that_is_none_ends_with_2(imports_env: Import) -> None:
    done = imports_env("A=1\nhunter2 is it\n")

    assert (done.code, done.out) == (2, "")
    assert "line 2: no KEY=VALUE" in done.err
    assert "hunter2" not in done.err


def test_nothing_to_import_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-defguard"]) == 2
    assert "say what to import" in capsys.readouterr().err


# What is printed.


def test_what_comes_from_their_file_cannot_leave_its_comment_or_drive_a_terminal(imports: Import) -> None:
    evil = "x\n[log]\nlevel = 1\x1b[2J\x85\u2028\x7f"

    done = imports({evil: 1, "grpc_cert": evil, "post_up": f"a {evil}"})

    assert set(done.document) == {"interface", "core", "defguard", "hooks"}
    assert all(c.isprintable() or c == "\n" for c in done.out + done.err)
    assert done.config.hooks.post_up[0][1:] == tuple(evil.split())


@given(st.recursive(st.text() | st.booleans() | st.integers(-(2**63), 2**63 - 1), st.lists, max_leaves=5))
def test_a_value_is_read_back_as_it_was_written(value: Any) -> None:
    text = toml_value(value)

    assert tomllib.loads(f"key = {text}") == {"key": value}
    assert "\n" not in text


OPTIONS = sorted({*VARIABLES.values(), "name", "pidfile", "use_syslog", "x"} - {"grpc_url"})
VALUES = st.text() | st.integers(-10, 70_000) | st.booleans() | st.lists(st.text(max_size=3), max_size=2)
LIKELY = st.sampled_from(
    ["true", "0", "50066", "debug", "10.0.0.1", "::1", "wg1", "/etc/x", "sh -c 'a'", "%i"]
)


@given(st.dictionaries(st.sampled_from(OPTIONS), VALUES | LIKELY))
def test_whatever_the_options_are_what_is_printed_is_a_configuration(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, object]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    draft = carry_over(
        {**options, "grpc_url": "https://core.example.com/"} if "token" in options else options
    )

    path.write_text("\n".join(_lines(draft, ["x"])), newline="\n")

    config = load_config(path)
    assert config.core.protocol == "defguard"
    # Each option is carried over, left to the operator, or named with the reason.
    told = " ".join((*draft.todo, *draft.left, path.read_text()))
    for option in options.keys() & {"name", "pidfile", "use_syslog", "x"}:
        assert options[option] == "" or option in told


def test_check_takes_what_was_printed(imports: Import, tmp_path: Path) -> None:
    done = imports(ONE, "--token-file", str(tmp_path / "token"))
    (tmp_path / "printed.toml").write_text(done.out)

    checked = wg_agent("check", "-c", tmp_path / "printed.toml")

    assert f"✓ configuration  {tmp_path}/printed.toml is valid, for wg0" in checked.stdout
    assert "✓ credentials" in checked.stdout
