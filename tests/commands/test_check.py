"""Each fault is provoked for real; what is printed has to name it and its remedy."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from agent.__main__ import main
from agent.commands import check_files
from agent.curve25519 import clamp, public_key
from agent.encoding import format_key, format_time
from agent.folders import claim_state
from agent.lock import InterfaceLock
from tests.commands.parts import Agent, a_core, an_agent, wg_agent, write_config
from tests.core.fakes import PSK, TOKEN, Core, answer, body, peer, state
from tests.support import needs


def now(offset: float = 0.0) -> str:
    return format_time(time.time() + offset)


def good_state(*peers: Any, **changed: Any) -> bytes:
    return body(state(*peers, **{"server_time": now()} | changed))


@pytest.fixture
def told() -> Iterator[Core]:
    """A core that answers as it should."""
    with a_core() as core:
        core.on("state", answer(200, good_state(peer())))
        yield core


def check(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """The exit code and the findings of each kind of check."""
    code = main(["check", "--json", "-c", str(path)])
    return code, by_name(capsys.readouterr().out)


def by_name(out: str) -> dict[str, list[dict[str, str]]]:
    document = json.loads(out)
    findings: dict[str, list[dict[str, str]]] = {}
    for finding in document["checks"]:
        findings.setdefault(finding["check"], []).append(finding)
    assert document["ok"] == all(f["mark"] != "fault" for f in document["checks"])
    return findings


def crosses(out: str) -> dict[str, str]:
    """What people see: each cross, with the remedy on the line below."""
    lines = out.splitlines()
    found = {}
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  ✗ "):
            assert below.lstrip().startswith("→ "), line
            question, message = re.split(r" {2,}", line.removeprefix("  ✗ "), maxsplit=1)
            found[f"{question}: {message}"] = below.lstrip().removeprefix("→ ")
    return found


def the_cross(out: str, of: str) -> tuple[str, str]:
    return next((fault, remedy) for fault, remedy in crosses(out).items() if fault.startswith(of + ": "))


# The operator's commands.


def test_a_program_that_is_not_there_is_a_fault_where_the_interface_waits_for_it(
    tmp_path: Path, told: Core, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(
        tmp_path, told.url, more='[hooks]\npre_up = [["true"], ["no-such"]]\npost_up = [["nor-such"]]'
    )

    _, found = check(path, capsys)

    why = "can't be started: there is no such program"
    assert [(one["mark"], one["message"]) for one in found["hooks"]] == [
        ("fault", f"hooks.pre_up, command 2 (no-such) {why}, and the interface stays down"),
        ("warning", f"hooks.post_up, command 1 (nor-such) {why}"),
    ]


# The configuration.


def test_an_unknown_key_is_a_cross_with_the_nearest_known_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, more="[sessions]\nidle_timout = 3")

    assert main(["check", "-c", str(path)]) == 1

    fault, remedy = the_cross(capsys.readouterr().out, "configuration")
    assert "unknown key sessions.idle_timout; did you mean sessions.idle_timeout?" in fault
    assert str(path) in remedy


def test_a_wrong_value_is_a_cross(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = check(write_config(tmp_path, "http://core.example.com/"), capsys)

    assert code == 1
    assert "would send the token in the clear" in found["configuration"][0]["message"]
    assert found["everything else"][0]["mark"] == "skipped"


def test_a_file_that_is_not_toml_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wg0.toml"
    path.write_text("[core\n")

    assert main(["check", "-c", str(path)]) == 2
    assert "not TOML" in capsys.readouterr().err


# Key files.


@pytest.mark.parametrize("name", ["token", "state/private.key"])
def test_a_loose_moded_key_file_is_named_with_its_chmod(
    name: str, told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, told.url)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True, mode=0o700)
    file.write_text(format_key(bytes(range(32))))
    file.chmod(0o644)

    assert main(["check", "-c", str(path)]) == 1

    out = capsys.readouterr().out
    fault, remedy = the_cross(out, "credentials" if name == "token" else "private key")
    assert f"{file} has mode 0644" in fault
    assert remedy == f"chmod 600 {file}"
    assert format_key(bytes(range(32))) not in out


@pytest.mark.parametrize("name", ["token", "state/private.key"])
def test_an_unreadable_key_file_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True, mode=0o700)
    file.touch()
    file.chmod(0)
    drop = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override")

    done = wg_agent("check", "-c", path, through=drop)

    assert done.returncode == 1
    fault, remedy = the_cross(done.stdout, "credentials" if name == "token" else "private key")
    assert f"{file} can't be read: Permission denied" in fault
    assert "the agent's user must own it; under systemd pass it with LoadCredential=" in remedy


def test_every_secret_with_a_fault_is_named_at_once(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f'[push]\nlisten = "127.0.0.1:0"\nsecret_file = "{tmp_path}/none"'
    path = write_config(tmp_path, told.url, more=more)
    (tmp_path / "token").chmod(0o640)

    code, found = check(path, capsys)

    assert code == 1
    assert [finding["mark"] for finding in found["credentials"]] == ["fault", "fault"]
    assert "core.token_file" in found["credentials"][0]["message"]
    assert "push.secret_file" in found["credentials"][1]["message"]
    assert found["core"][0]["mark"] == "skipped"
    assert told.requests == []


def test_a_fault_of_the_push_secret_does_not_keep_core_from_being_asked(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "push"
    secret.write_text("whsec_short")
    secret.chmod(0o600)
    more = f'[push]\nlisten = "127.0.0.1:0"\nsecret_file = "{secret}"'

    _, found = check(write_config(tmp_path, told.url, more=more), capsys)

    assert "no Standard Webhooks secret" in found["credentials"][0]["message"]
    assert found["core"][0]["mark"] == "ok"


def test_a_push_certificate_that_cannot_be_used_is_a_cross(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("push", "whsec_" + "A" * 44), ("cert", "x"), ("key", "x")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o600)
    more = (
        '[push]\nlisten = "127.0.0.1:0"\nsecret_file = "push"\ntls_cert_file = "cert"\ntls_key_file = "key"'
    )

    code, found = check(write_config(tmp_path, told.url, more=more), capsys)

    assert code == 1
    assert "PEM" in found["push certificate"][0]["remedy"]


def test_the_public_key_to_register_is_shown_and_a_missing_key_is_not_made(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, told.url)
    _, found = check(path, capsys)
    assert found["private key"][0]["mark"] == "info"
    assert "makes it when it first starts" in found["private key"][0]["message"]
    assert not (tmp_path / "state").exists()

    private = clamp(bytes(range(32)))
    (tmp_path / "state").mkdir(mode=0o700)
    key = tmp_path / "state" / "private.key"
    key.write_text(format_key(private))
    key.chmod(0o600)

    _, found = check(path, capsys)
    assert found["private key"][0]["message"].endswith(format_key(public_key(private)))


def test_a_folder_that_others_may_write_to_is_a_cross(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)

    code, found = check(write_config(tmp_path, told.url), capsys)

    assert code == 1
    assert f"chmod 700 {tmp_path}/state" in found["folders"][0]["remedy"]


def test_another_interfaces_state_folder_is_a_cross(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, told.url, name="wg1")
    (tmp_path / "state").mkdir(mode=0o700)
    assert check(path, capsys)[1]["folders"][0]["mark"] == "ok"

    claim_state(tmp_path / "state", "wg0")
    code, found = check(path, capsys)

    assert code == 1
    assert "belongs to the interface 'wg0'" in found["folders"][0]["message"]


def test_what_the_running_unit_is_given_is_what_check_sees(
    told: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, told.url)
    path.write_text(path.read_text().replace('token_file = "token"', ""))

    code, found = check(path, capsys)
    assert code == 1
    assert "there is no token" in found["credentials"][0]["message"]
    assert "run check while the unit runs" in found["credentials"][0]["remedy"]

    monkeypatch.setattr(check_files, "CREDENTIALS", tmp_path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")  # so that the change is undone
    given = tmp_path / "wg-agent@wg0.service"
    given.mkdir()
    (tmp_path / "token").rename(given / "core.token")
    _, found = check(path, capsys)
    assert found["credentials"][0]["mark"] == "ok"
    assert found["core"][0]["mark"] == "ok"


# Core.


def test_a_core_that_answers_is_a_tick_with_its_location(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told.on("state", answer(200, good_state(peer(1), peer(2))))

    _, found = check(write_config(tmp_path, told.url), capsys)

    assert found["core"][0]["mark"] == "ok"
    assert "location hq requires MFA, 2 peers" in found["core"][0]["message"]
    assert found["clock"][0]["mark"] == "ok"
    assert [request.path for request in told.requests] == ["/gateway/v1/state"]


@pytest.mark.parametrize(
    ("status", "content", "fault", "remedy"),
    [
        (404, b"", "core.url is wrong", "core.url ends where the API's paths"),
        (401, b"", "core refuses the token (401)", "ask core for a new token"),
        (403, b"", "core refuses the token (403)", "core.token_file"),
        (302, b"", "core redirects (302)", "set core.url to the address"),
        (503, b"", "core answers 503", "tries again by itself; if it lasts, see core's own log"),
        (200, b"<html>hello</html>", "it is not JSON", "does not keep to the API"),
        (204, b"", "core answers 204 where the API has 200", "check core.url"),
    ],
)
def test_an_answer_of_core_that_is_a_fault_is_named_with_its_remedy(
    status: int,
    content: bytes,
    fault: str,
    remedy: str,
    told: Core,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told.on("state", answer(status, content))

    assert main(["check", "-c", str(write_config(tmp_path, told.url))]) == 1

    out = capsys.readouterr().out
    found = the_cross(out, "core")
    assert fault in found[0]
    assert told.url in found[0]
    assert remedy in found[1]
    assert TOKEN not in out


def test_a_core_that_is_silent_is_named_after_the_timeout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/gateway/v1/"
        path = write_config(tmp_path, url)
        path.write_text(path.read_text().replace("[paths]", "timeout = 1\n[paths]"))
        code, found = check(path, capsys)

    assert code == 1
    assert "silent for too long" in found["core"][0]["message"]
    assert "core's own log" in found["core"][0]["remedy"]


@pytest.mark.parametrize(
    ("url", "fault", "remedy"),
    [
        ("http://127.0.0.1:1/gateway/v1/", "Connection refused", "check host and port in core.url"),
        ("https://core.invalid/gateway/v1/", "name can't be resolved", "check the name in core.url"),
        ("http+unix:///nowhere/core.sock:/v1/", "No such file or directory", "is core running?"),
    ],
)
def test_a_core_that_cannot_be_reached_says_why(
    url: str, fault: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "-c", str(write_config(tmp_path, url))]) == 1

    found = the_cross(capsys.readouterr().out, "core")
    assert fault in found[0]
    assert remedy in found[1]


def certified(leaf: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    leaf.configure_cert(context)
    return context


@pytest.mark.parametrize(
    ("name", "age", "trusted", "fault", "remedy"),
    [
        ("localhost", 0, False, "certificate is not trusted", "set core.ca_file to the CA that signed it"),
        ("other.example", 0, True, "certificate is for another name", "use the name in the certificate"),
        ("localhost", 10, True, "certificate has expired", "renew it, and check this host's clock"),
    ],
)
def test_a_certificate_that_does_not_hold_is_named_with_its_remedy(
    name: str,
    age: int,
    trusted: bool,
    fault: str,
    remedy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ca = trustme.CA()
    begin = datetime.now(UTC) - timedelta(days=age + 1)
    leaf = ca.issue_cert(name, not_before=begin, not_after=begin + timedelta(days=2))
    (tmp_path / "ca.pem").write_bytes(ca.cert_pem.bytes())

    with a_core(certified(leaf)) as core:
        core.on("state", answer(200, good_state()))
        path = write_config(tmp_path, core.url)
        if trusted:
            path.write_text(path.read_text().replace("[paths]", 'ca_file = "ca.pem"\n[paths]'))
        assert main(["check", "-c", str(path)]) == 1

    found = the_cross(capsys.readouterr().out, "core")
    assert fault in found[0]
    assert remedy in found[1]
    assert core.requests == []


def test_a_certificate_of_the_configured_ca_is_fine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ca = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(ca.cert_pem.bytes())

    with a_core(certified(ca.issue_cert("localhost"))) as core:
        core.on("state", answer(200, good_state()))
        path = write_config(tmp_path, core.url)
        path.write_text(path.read_text().replace("[paths]", 'ca_file = "ca.pem"\n[paths]'))
        _, found = check(path, capsys)

    assert found["core"][0]["mark"] == "ok"


@pytest.mark.parametrize(("offset", "words"), [(-3600, "3600 s ahead of"), (3600, "3600 s behind")])
def test_clocks_that_differ_are_a_warning(
    offset: float, words: str, told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told.on("state", answer(200, good_state(server_time=now(offset))))

    _, found = check(write_config(tmp_path, told.url), capsys)

    assert found["clock"][0]["mark"] == "warning"
    assert words in found["clock"][0]["message"]
    assert "timedatectl set-ntp true" in found["clock"][0]["remedy"]


def test_peers_that_core_lists_wrongly_are_a_warning_without_their_secrets(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [peer(1, allowed_ips=["10.8.0.1/24"]), peer(2, name="two\x1b[31m", public_key="rubbish"), peer(3)]
    told.on("state", answer(200, good_state(*bad)))

    main(["check", "-c", str(write_config(tmp_path, told.url))])

    out = capsys.readouterr().out
    assert "! peers          wrongly listed in core, and so refused (2): " in out
    assert "device-1 (invalid_allowed_ips)" in out
    assert "(invalid_public_key)" in out
    assert not {"\x1b"} & set(out)
    assert PSK not in out


# The host.


def test_no_wireguard_is_named_with_what_to_install(
    told: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_config(tmp_path, told.url, name="wgnone", backend="userspace")

    assert main(["check", "-c", str(path)]) == 1

    fault, remedy = the_cross(capsys.readouterr().out, "wireguard")
    assert fault == "wireguard: no WireGuard: there is no program wireguard-go"
    assert "install wireguard-go" in remedy


@pytest.mark.parametrize("backend", ["auto", "kernel"])
def test_a_kernel_without_wireguard_is_named_where_it_has_none(
    backend: str,
    told: Core,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_config(tmp_path, told.url, name="wgnone", backend=backend)
    has_it = needs.no_kernel_wireguard() is None

    _, found = check(path, capsys)

    (finding,) = found["wireguard"]
    assert finding["mark"] == ("ok" if has_it else "fault")
    if not has_it:
        assert re.search("the kernel has (no WireGuard|none)", finding["message"])
        assert "modprobe wireguard" in finding["remedy"]
        assert "wireguard-go" in finding["remedy"]


def test_the_guard_can_be_had_here(told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = check(write_config(tmp_path, told.url), capsys)

    assert [finding["mark"] for finding in found["guard"]] == ["ok"]


def test_no_permission_is_named_with_its_remedy(told: Core, tmp_path: Path) -> None:
    drop = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")

    done = wg_agent("check", "-c", write_config(tmp_path, told.url), through=drop)

    assert done.returncode == 1
    fault, remedy = the_cross(done.stdout, "permission")
    assert "CAP_NET_ADMIN is missing" in fault
    assert "run as root, or by the unit wg-agent@.service" in remedy


def test_ports_that_others_have_are_named(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told.on("state", answer(200, good_state(interface={})))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.create_server(("127.0.0.1", 0)) as tcp,
    ):
        udp.bind(("127.0.0.1", 0))
        port, http = udp.getsockname()[1], tcp.getsockname()[1]
        more = f'[http]\nlisten = "127.0.0.1:{http}"'
        path = write_config(tmp_path, told.url, name="wgnone", more=more, listen_port=port)
        code, found = check(path, capsys)

    assert code == 1
    assert f"UDP port {port} can't be had" in found["listen port"][0]["message"]
    assert f"ss -lunp 'sport = :{port}'" in found["listen port"][0]["remedy"]
    assert f"http.listen: can't listen on 127.0.0.1:{http}" in found["listeners"][0]["message"]
    assert f"ss -ltnp 'sport = :{http}'" in found["listeners"][0]["remedy"]


def test_a_running_agent_keeps_its_ports_and_its_lock(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = Agent()
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        more = f'[http]\nlisten = "127.0.0.1:{tcp.getsockname()[1]}"'
        path = write_config(tmp_path, told.url, more=more)
        with InterfaceLock(tmp_path / "run", "wg0"), an_agent(path, agent):
            _, found = check(path, capsys)

    assert "an agent runs on wg0" in found["agent"][0]["message"]
    assert "listeners" not in found
    assert agent.asked == []


def test_the_wireguard_probe_matches_what_this_machine_can_do(
    told: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = check(write_config(tmp_path, told.url, name="wgnone"), capsys)

    able = needs.no_userspace_wireguard() is None or needs.no_kernel_wireguard() is None
    assert found["wireguard"][0]["mark"] == ("ok" if able else "fault")
