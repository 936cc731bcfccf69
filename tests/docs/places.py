"""Where each command of the documentation is run, what has to be the case there, and what is not run at all.

Somebody who adds a shell block to a document says here where it belongs; a test names the block otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from typing import Final

from tests.docs.gateway import INTERFACE, Gateway
from tests.docs.markdown import Block, documents
from tests.support.site import until


class Place(StrEnum):
    """Where a section's blocks are run, one after the other."""

    CHECKOUT = "in the checkout, as whoever runs the tests"
    GATEWAY = "on a gateway of its own, in namespaces of this machine, with a core and two devices"
    HOST = "on the lab's machine under systemd, where the sections before it have been worked through"


PLACES: Final[dict[str, Place]] = {
    "README.md": Place.CHECKOUT,
    "docs/first-gateway.md": Place.HOST,
    "docs/operations.md": Place.GATEWAY,
    "docs/operations.md#by-systemd": Place.HOST,
    "docs/operations.md#changing-the-configuration": Place.HOST,
    "docs/operations.md#upgrade": Place.HOST,
    "docs/operations.md#rotating-cores-token": Place.HOST,
    "docs/operations.md#rotating-the-interfaces-key": Place.HOST,
    "docs/operations.md#the-vpn-closed-altogether": Place.HOST,
    "docs/operations.md#when-the-agent-hangs": Place.HOST,
    "docs/troubleshooting.md": Place.GATEWAY,
    "docs/security.md": Place.GATEWAY,
    "docs/security.md#the-unit": Place.HOST,
    "docs/defguard.md": Place.GATEWAY,
    "docs/high-availability.md#2-the-agents": Place.GATEWAY,
    "docs/core-api.md": Place.GATEWAY,
    "docs/monitoring/README.md": Place.CHECKOUT,
}
"""By document, or by document#section, which goes before."""

ELSEWHERE: Final[dict[str, tuple[str, str]]] = {
    "docs/install.md": (
        "tests/packaging/test_installed.py",
        "installs, upgrades, removes and purges the package under systemd, with apt's own commands",
    ),
    "docs/high-availability.md": (
        "tests/e2e/test_two_gateways.py",
        "runs keepalived and both of its files on two gateways: they take more than one machine",
    ),
}
"""By document: the test that does what its commands do, and how; sections that have a place are run there."""

WALK: Final = ("docs/first-gateway.md", "docs/operations.md", "docs/security.md")
"""The order of documents on the lab's machine, which gets further with each section."""

LAST: Final = ("docs/first-gateway.md#taking-it-all-down-again",)
"""What ends the walk."""

_BY_UNIT: Final = "tests/kernel/test_systemd_unit.py has the unit start beside a Defguard core"
EXCEPTIONS: Final[dict[tuple[str, str], str]] = {
    ("README.md", "make demo"): "tests/e2e/test_main_job.py plays it, and looks at more than its exit code",
    ("README.md", "make test"): "it is what runs this",
    ("README.md", "make lint"): "it is run beside the tests (.ci/run)",
    ("README.md", "make bench"): "takes an hour; tests/bench/test_bench.py runs its parts",
    ("README.md", "make reliability"): "takes an hour; each of its scenarios has a shorter one in the tests",
    (
        "docs/core-api.md#is-it-right",
        "wg-agent conformance --core https://core.example.com/gateway/v1/ --token-file token",
    ): "it is run on a real core further down, with what makes core change",
    ("docs/operations.md#upgrade", "systemctl restart wg-agent@wg0"): (
        "tests/packaging/test_installed.py upgrades with live traffic; a restart is run further down"
    ),
    ("docs/defguard.md", "wg-agent check -i wg0"): _BY_UNIT,
    (
        "docs/defguard.md",
        "systemctl disable --now defguard-gateway",
    ): "Defguard's gateway is not to be had here",
    (
        "docs/defguard.md",
        "systemctl enable --now defguard-gateway",
    ): "Defguard's gateway is not to be had here",
    ("docs/defguard.md", "systemctl enable --now wg-agent@wg0"): _BY_UNIT,
    ("docs/defguard.md", "systemctl disable --now wg-agent@wg0"): _BY_UNIT,
}
"""Lines that are not run, by document or section, each with the reason. Every other one is."""

Scene = Callable[[Gateway], AbstractContextManager[None]]


@contextmanager
def core_is_away(gateway: Gateway) -> Iterator[None]:
    gateway.core.kill()
    until(lambda: "can't be reached" in gateway.status()["core_error"], what="the loss of core")
    yield


@contextmanager
def agent_is_stopped(gateway: Gateway) -> Iterator[None]:
    gateway.stop_agent()
    yield


@contextmanager
def token_is_refused(gateway: Gateway) -> Iterator[None]:
    token = gateway.root / "etc/wg-agent/wg0.token"
    gateway.stop_agent()
    token.write_text("another-gateways\n")
    gateway.start_agent(ready=False)
    until(lambda: "token" in gateway.status()["core_error"], what="the refusal of the token")
    yield


@contextmanager
def gateway_is_listed_as_a_device(gateway: Gateway) -> Iterator[None]:
    key = gateway.gateway.run("wg", "show", INTERFACE, "public-key").stdout.strip()
    device = {"location": "hq", "name": "gateway-by-mistake", "public_key": key}
    gateway.core.call(gateway.core.admin.add_devices([device]))
    until(lambda: len(gateway.status()["peers"]) == 3, what="the news of it")
    yield


@contextmanager
def defguards_gateway_is_configured(gateway: Gateway) -> Iterator[None]:
    (gateway.root / "etc/wg-agent/wg0.token").unlink()
    etc = gateway.root / "etc/defguard"
    etc.mkdir()
    (etc / "gateway.toml").write_text(
        'token = "secret"\ngrpc_url = "https://defguard.example.com:50055/"\nifname = "wg0"\n'
    )
    yield


@contextmanager
def core_may_push(gateway: Gateway) -> Iterator[None]:
    [making] = [
        block
        for block in documents()["docs/operations.md"].blocks
        if block.section == "letting-core-push" and block.language == "sh"
    ]
    done = gateway.run(making.text)
    assert done.returncode == 0, done.stdout
    gateway.stop_agent()
    with (gateway.root / "etc/wg-agent/wg0.toml").open("a") as config:
        config.write(
            '[push]\nsecret_file = "wg0.push"\n'
            'tls_cert_file = "wg0-push.pem"\ntls_key_file = "wg0-push.key"\n'
        )
    gateway.start_agent()
    yield


SCENES: Final[dict[str, Scene]] = {
    "docs/defguard.md#moving-a-gateway-over": defguards_gateway_is_configured,
    "docs/defguard.md#moving-back": agent_is_stopped,
    "docs/operations.md#trying-a-push": core_may_push,
    "docs/operations.md#when-core-is-away": core_is_away,
    "docs/troubleshooting.md#own_public_key": gateway_is_listed_as_a_device,
    "docs/troubleshooting.md#core-cant-be-reached": core_is_away,
    "docs/troubleshooting.md#the-token-is-refused": token_is_refused,
    "docs/troubleshooting.md#readyz-is-503": core_is_away,
}
"""What is made the case on a gateway before a section's commands."""


def place_of(block: Block) -> Place | None:
    """Where a block is run; None if nobody has said."""
    return PLACES.get(f"{block.document}#{block.section}", PLACES.get(block.document))


def run_elsewhere(block: Block) -> bool:
    """Whether what a block does is done by a test of its own."""
    return place_of(block) is None and block.document in ELSEWHERE


def not_run(block: Block) -> list[str]:
    """The lines of a block that are exceptions."""
    names = (block.document, f"{block.document}#{block.section}")
    return [line for name, line in EXCEPTIONS if name in names]
