"""The running agent's listeners against hostile clients: push, its own HTTP, the operator's socket."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path

import msgspec
import pytest

from tests.reliability.door import HTTP, PUSH, Door, attacking, open_door
from tests.reliability.pushing import PATH, Answer, Courier, push_secret, signed
from tests.reliability.tls_front import Pair, client_context
from tests.support.ledger import FULL, Seen
from tests.support.scenarios import monotonic_of, ping
from tests.support.site import Site, until

pytestmark = [pytest.mark.netns, pytest.mark.userspace]

MAX_BODY = 1 << 20
PLACES = 64
"""Connections that each of the three listeners holds at most."""
SPARE = 8
"""Descriptors that the agent's other work may have open beside them at the moment of a look."""
CUT_OFF = 5.0 + 10.0 + 1.5
"""Seconds for a TLS handshake, for a request to arrive, and a little for a busy machine."""
SLOW = 500
HELD_FOR = 60.0 if FULL else 0.5
THROWN = 10_000 if FULL else 500
WARM_UP = 1_000 if FULL else 100
GROWTH = 16 << 20
ASKED = 50 if FULL else 20
"""Requests of which a median is taken."""


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with open_door(tmp_path_factory.mktemp("door")) as door:
        yield door


def chunked(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 8192):
        yield body[start : start + 8192]


@pytest.mark.reliability(
    "Pushes that are unsigned, forged, stale, dated ahead, cut short, too large or sent again",
    "none changes anything; core's own still arrive",
)
def test_a_push_that_is_not_cores_fresh_word_changes_nothing(door: Door, seen: Seen) -> None:
    client = door.renewed
    session_id = client.sessions[-1]
    held = door.site.status()["revision"]
    applied = door.renew()
    assert applied.json() == {"revision": held + 1, "refused": []}
    old = door.pushing.body(door.pushing.changes(held))
    psk = door.site.shown()[client.public_key]["preshared_key"]

    # What a thief of the channel would send: the end of a session that core has not ended.
    core_id, location = door.site.core.do(lambda core: core.directory.location("hq").epoch), 1
    end = {"id": f"{core_id}:{held + 2}", "type": "session_revoked"}
    data = {"public_key": client.public_key, "session_id": session_id}
    body = json.dumps({"location": str(location), "changes": [end | {"data": data}]}).encode()
    good = signed(door.secret, body)
    too_large = body + b" " * (MAX_BODY + 1 - len(body))
    refused: list[tuple[str, int, object, dict[str, str]]] = [
        ("no signature", 401, body, {}),
        ("no id", 401, body, {k: v for k, v in good.items() if k != "webhook-id"}),
        ("another secret", 401, body, signed(push_secret(), body)),
        ("another body", 401, body + b" ", good),
        ("another id", 401, body, good | {"webhook-id": "msg_1"}),
        ("another time", 401, body, good | {"webhook-timestamp": str(int(time.time()) - 1)}),
        ("stale", 401, body, signed(door.secret, body, age=302)),
        ("dated ahead", 401, body, signed(door.secret, body, age=-302)),
        ("too large", 413, too_large, signed(door.secret, too_large)),
        ("too large, its size not told", 413, chunked(too_large), signed(door.secret, too_large)),
        ("cut JSON", 400, body[:-9], signed(door.secret, body[:-9])),
        ("wrong path", 404, body, good),
    ]
    for what, status, content, headers in refused:
        path = "/v1/state" if what == "wrong path" else PATH
        answer = door.push.ask("POST", path, content, headers)
        assert answer.status == status, (what, answer)
    assert (door.site.status()["revision"], door.site.peer(client)["state"]) == (held + 1, "up")

    # The same word of core's again, also by the same message id, is a 200 without effect.
    again = signed(door.secret, old, message="msg_again")
    for _ in range(3):
        assert door.pushing.send(old, again).json() == {"revision": held + 1, "refused": []}
    assert door.site.shown()[client.public_key]["preshared_key"] == psk
    after_that = door.renew()
    assert door.pushing.send(old, again).json()["revision"] == after_that.json()["revision"]
    assert door.site.shown()[client.public_key]["preshared_key"] not in {psk, "(none)"}
    assert door.site.peer(client)["session_id"] == session_id
    seen(tried=len(refused) + 4, note="401, 413, 400; a repeated push is a 200 without effect")


@pytest.mark.reliability(
    "500 connections to each listener that say nothing, or a byte now and then, and come back",
    "a push and a scrape get through within 1 s; connections are bounded in number and time",
)
def test_slow_and_silent_connections_keep_nobody_out(door: Door, seen: Seen) -> None:
    before = door.descriptors()
    counts = dict.fromkeys((PUSH, HTTP, door.control.target), SLOW)
    waits: dict[str, list[float]] = {"push": [], "scrape": [], "status": []}
    most = 0
    with ping(door.staying) as pings, attacking(door, "hold", counts, HELD_FOR) as attacks:
        pings.wait_reply()
        for attack in attacks:
            attack.wait_arrived()
        while not all(attack.over for attack in attacks):
            waits["push"].append(door.renew().seconds)
            waits["scrape"].append(door.scrape().seconds)
            waits["status"].append(door.control.ask("GET", "/status").seconds)
            most = max(most, door.descriptors())
            time.sleep(0.1)
        reports = [attack.report() for attack in attacks]
        pings.wait_reply()
    assert all(report["opened"] >= SLOW for report in reports)
    assert [report["never_closed"] for report in reports] == [0, 0, 0]
    longest = max(report["longest"] for report in reports)
    worst = max(map(max, waits.values()))
    assert longest < CUT_OFF
    assert most <= before + len(counts) * PLACES + SPARE
    assert most >= before + PLACES  # they really were there
    assert worst < 1.0
    assert pings.lost == 0
    assert door.errors_logged() == []
    until(lambda: door.descriptors() <= before + SPARE, what="the end of all connections")
    seen(
        tried=sum(report["opened"] for report in reports),
        lost=pings.lost,
        note=f"longest connection {longest:.1f} s, slowest push {max(waits['push']) * 1000:.0f} ms",
    )


def median(ask: Callable[[], Answer]) -> float:
    return statistics.median(ask().seconds for _ in range(ASKED))


@pytest.mark.reliability(
    "Garbage thrown at push, /metrics and the operator's socket: 10,000 requests of 20 kinds",
    "memory and latency stay where they were; a live session loses no ping, another ends on time",
)
def test_garbage_leaves_memory_latency_and_sessions_as_they_were(door: Door, seen: Seen) -> None:
    # The first of them make the process load this and that, and its heap as large as so many at once need.
    with attacking(door, "throw", shares(door, WARM_UP)) as attacks:
        for attack in attacks:
            attack.report()
    memory, descriptors = door.memory(), door.descriptors()
    log_size = door.site.log.stat().st_size
    before = median(door.renew), median(door.scrape)
    seconds = 3.0
    session, psk = door.grant(door.ending, lifetime=seconds)
    deadline = monotonic_of(session.expires_at)
    door.site.connect(door.ending, psk)
    pushes, scrapes = [], []
    with ping(door.staying) as kept, ping(door.ending) as cut:
        kept.wait_reply()
        cut.wait_reply()
        with attacking(door, "throw", shares(door, THROWN), seconds) as attacks:
            while not all(attack.over for attack in attacks):
                pushes.append(door.renew().seconds)
                scrapes.append(door.scrape().seconds)
            reports = [attack.report() for attack in attacks]
        last_reply = cut.wait_silence(1.0)
        kept.wait_reply()
    after = median(door.renew), median(door.scrape)
    thrown = sum(report["thrown"] for report in reports)
    assert thrown >= THROWN
    assert kept.lost == 0
    assert deadline - 1.0 < last_reply < deadline + 1.0
    during = statistics.median(pushes), statistics.median(scrapes)
    assert max(during) < 1.0
    for was, is_now in zip(before, after, strict=True):
        assert is_now < was * 2 + 0.005
    grown = door.memory() - memory
    assert grown < GROWTH
    assert door.descriptors() <= descriptors + SPARE
    assert door.errors_logged() == []
    # Core's pushes are logged one by one; what strangers send must not fill a disk.
    logged = door.site.log.stat().st_size - log_size
    legitimate = len(pushes) + 2 * ASKED
    assert logged < legitimate * 2_000 + 20_000
    spoken = {status for report in reports for status in (end.rpartition(": ")[2] for end in report["ends"])}
    assert {"400", "401", "404", "405", "413"} & spoken >= {"400", "401"}
    seen(
        tried=thrown,
        overrun=last_reply - deadline,
        lost=kept.lost,
        note=f"memory {grown / 2**20:+.1f} MiB; median push {before[0] * 1000:.1f} ms before, "
        f"{during[0] * 1000:.1f} during, {after[0] * 1000:.1f} after",
    )


def shares(door: Door, count: int) -> dict[str, int]:
    """How much of it each listener gets."""
    return {PUSH: count // 2, HTTP: count * 3 // 10, door.control.target: count // 5}


def nested(depth: int) -> bytes:
    return b'{"location": "1", "changes": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.reliability(
    "Nonsense with core's own signature: deep JSON, huge numbers, repeated keys, other locations",
    "a 400 or 409 without effect, the state is pulled, memory stays",
)
def test_nonsense_that_core_signed_changes_nothing_and_makes_the_agent_pull(door: Door, seen: Seen) -> None:
    held = door.site.status()["revision"]
    memory = door.memory()
    invalid = door.site.metric("wg_agent_core_invalid_total")
    number = b"9" * 5_000
    change = b'{"id": "%s", "type": "peer_removed", "data": {"public_key": "x"}}'
    cases = [
        nested(100_000),
        b'{"a":' * 100_000 + b"0" + b"}" * 100_000,
        b'{"location": "1", "changes": [' + number + b"]}",
        b'{"location": "1", "changes": [' + change % (b"x:" + number) + b"]}",
        b'{"location": "1", "location": "1", "changes": []}',
        b'{"location": "1", "changes": [' + b'{"id": 1},' * 50_000 + b"0]}",
        b'{"location": NaN, "changes": []}',
        b'"' + b"\\u0000" * 50_000 + b'"',
        b"",
    ]
    rounds = 20 if FULL else 1
    for _ in range(rounds):
        for body in cases:
            answer = door.pushing.send(body)
            assert answer.status == 400, (body[:60], answer)
            assert len(answer.body) < 300
    other = b'{"location": "no", "changes": [' + change % b"e:1" + b"]}"
    assert door.pushing.send(other).status in {400, 409}
    assert door.site.metric("wg_agent_core_invalid_total") >= invalid + rounds * len(cases)
    assert door.renew().json()["revision"] == held + 1
    grown = door.memory() - memory
    assert grown < GROWTH
    assert door.errors_logged() == []
    seen(tried=rounds * len(cases) + 1, note=f"memory {grown / 2**20:+.1f} MiB")


@pytest.mark.reliability(
    "Clients of the push listener without a certificate, with an expired one, with another CA's",
    "refused in the handshake and said in the log; core's own is served",
)
def test_a_listener_that_wants_certificates_serves_core_alone(door: Door, seen: Seen) -> None:
    body = door.pushing.body(door.pushing.changes(door.site.status()["revision"] - 1))
    headers = signed(door.secret, body)
    ca = door.ours.file
    strangers = {
        "no certificate": client_context(ca),
        "another CA's": client_context(ca, door.theirs.issue("core", "core.example")),
        "expired": client_context(ca, door.ours.issue("old", "core.example", expired=True)),
    }
    for context in strangers.values():
        with pytest.raises(OSError, match=r"(?i)alert|reset|closed|EOF"):
            door.push.ask("POST", PATH, body, headers, tls=context)
    with Courier(door.site.gateway, PUSH) as plain, pytest.raises((OSError, HTTPException)):
        plain.ask("POST", PATH, body, headers)
    assert door.pushing.send(body, headers).status == 200
    [said, *_] = door.site.logged("a client's certificate was refused")
    assert (said["level"], said["client"]) == ("warning", "127.0.0.1")
    seen(tried=len(strangers) + 1)


@pytest.mark.reliability(
    "Another host asks the gateway for /metrics and /healthz",
    "by default nobody listens there; push without TLS off loopback is a configuration error",
)
def test_metrics_are_for_this_host_and_push_off_it_needs_tls(door: Door, tmp_path: Path, seen: Seen) -> None:
    outside = door.staying.space
    assert outside is not None
    with Courier(outside, f"{door.staying.cable}.1:9586") as courier, pytest.raises(ConnectionRefusedError):
        courier.ask("GET", "/metrics")
    listens = ("", 'listen = "0.0.0.0:9587"\n', 'listen = "[::]:9587"\n') if FULL else ("",)
    for listen in listens:
        config = tmp_path / "agent.toml"
        lines = [line for line in door.site.config.read_text().splitlines() if "tls_" not in line]
        without = "\n".join(line for line in lines if "client_ca" not in line)
        config.write_text(without.replace('listen = "0.0.0.0:9587"\n', listen))
        done = door.site.gateway.run(
            sys.executable, "-m", "agent", "run", "-c", str(config), check=False, timeout=30
        )
        assert done.returncode == 2
        assert "push" in done.stderr
        assert "loopback" in done.stderr
    seen(tried=1 + len(listens))


@pytest.mark.reliability(
    "Core's certificate is of an unknown CA, expired or for another name; core refuses ours or gets none",
    "no connection; said plainly in log, status and /readyz; sessions go on; it recovers by itself",
)
def test_a_core_that_can_not_be_trusted_is_refused_and_taken_back(door: Door, seen: Seen) -> None:
    site, ours = door.site, door.ours
    stream(site)
    site.stop_agent()
    site.start_agent()
    good = ours.issue("front")
    mistrusted = {
        "is not trusted by this host": (door.theirs.issue("front"), ours.file),
        "has expired": (ours.issue("old-front", expired=True), ours.file),
        "is for another name": (ours.issue("other-front", "other.example"), ours.file),
        "does not accept this gateway's client certificate": (good, door.theirs.file),
    }
    took = []
    with ping(door.staying) as pings:
        pings.wait_reply()
        for words, (pair, client_ca) in mistrusted.items():
            door.front.show(pair, client_ca)
            refused(door, words)
            took.append(recovered(door, good))
        # Without a certificate of its own, where core wants one.
        with_it = site.config.read_text()
        lines = [line for line in with_it.splitlines() if not line.startswith("client_cert_file")]
        site.stop_agent()
        site.config.write_text("\n".join(line for line in lines if not line.startswith("client_key_file")))
        site.start_agent(ready=False)
        refused(door, "wants a client certificate")
        door.front.show(good)
        until(lambda: site.status()["core_connected"], 10, "core without client certificates")
        pings.wait_reply()
    assert pings.lost == 0
    assert site.peer(door.staying)["state"] == "up"
    seen(tried=len(mistrusted) + 1, lost=pings.lost, note=f"back after {max(took):.1f} s at most")


def stream(site: Site) -> None:
    """From now on core has a change stream, too."""
    service = site.core.service
    site.core.kill()
    service.config = msgspec.structs.replace(service.config, stream=True)
    site.core.start()


def refused(door: Door, words: str) -> None:
    """The agent gives core up for this reason, and says so wherever somebody may look."""

    def said() -> bool:
        status = door.site.status()
        return not status["core_connected"] and words in status["core_error"]

    until(said, 10, f"the status saying that core {words}")
    assert any(words in line["error"] for line in door.site.logged("core can't be followed"))
    answer = door.http.ask("GET", "/readyz")
    assert answer.status == 503
    assert words in answer.body.decode()
    assert door.site.metric("wg_agent_core_connected") == 0


def recovered(door: Door, good: Pair) -> float:
    """Seconds until core is back once it shows a good certificate."""
    door.front.show(good, door.ours.file)
    since = time.monotonic()
    until(lambda: door.site.status()["core_connected"], 10, "core's return")
    return time.monotonic() - since
