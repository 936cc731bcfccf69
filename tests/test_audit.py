from structlog.testing import capture_logs

from agent import audit
from agent.encoding import format_key
from agent.model import Change, PublicKey, SessionRevoked
from agent.plan import Drift, DriftKind


def drift(kind: DriftKind, count: int) -> list[Drift]:
    return [Drift(kind, PublicKey(number.to_bytes(32)), f"difference {number}") for number in range(count)]


def test_each_difference_has_a_line() -> None:
    with capture_logs() as logs:
        audit.drifted([*drift(DriftKind.GUARD, 1), Drift(DriftKind.FWMARK, None, "has another fwmark")])
    assert [(line["event"], line["kind"], line["peer"], line["detail"]) for line in logs] == [
        ("drift", "guard", format_key(PublicKey(bytes(32))), "difference 0"),
        ("drift", "fwmark", None, "has another fwmark"),
    ]


def test_a_thousand_differences_at_once_are_summed_up() -> None:
    with capture_logs() as logs:
        audit.drifted([*drift(DriftKind.GUARD, 1000), *drift(DriftKind.PEER_ADDED, 500)])
    assert len(logs) == 51
    assert logs[-1] == {
        "event": "more drift",
        "by_kind": {"guard": 950, "peer_added": 500},
        "log_level": "warning",
    }


def test_the_first_changes_of_a_moment_have_a_line_each_and_the_others_are_summed_up() -> None:
    bodies = [SessionRevoked(PublicKey(number.to_bytes(32)), f"s{number}") for number in range(60)]
    changes = [Change("e", revision, body) for revision, body in enumerate(bodies, 1)]
    with capture_logs() as logs:
        audit.changed(changes)
    assert [line["session"] for line in logs[:-1]] == [f"s{number}" for number in range(50)]
    assert logs[-1] == {
        "event": "more changes taken",
        "by_change": {"SessionRevoked": 10},
        "revision": 60,
        "log_level": "info",
    }
