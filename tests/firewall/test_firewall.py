import asyncio
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from agent import nft
from agent.encoding import parse_prefix
from agent.errors import GuardError
from agent.firewall import Firewall
from agent.guard import Admission, compare
from agent.model import PublicKey
from agent.nft import NftError
from agent.nftelements import ElementChange
from tests.firewall.behaviour import LONG, Behaviour
from tests.firewall.behaviours import BEHAVIOURS
from tests.firewall.stand import ALICE4, GATEWAY4, Stand, in_gateway, session
from tests.support.netns import Network

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("check", BEHAVIOURS, ids=lambda check: check.__name__)
@in_gateway
async def test_the_guard(stand: Stand, check: Behaviour) -> None:
    await check(stand)


@pytest.mark.parametrize("stand", ["wg-a.b=c+d", "wg_1", "WG.0", "3"], indirect=True)
@in_gateway
async def test_an_interface_of_any_name_is_guarded(stand: Stand) -> None:
    guard = stand.firewall()
    assert await guard.support() == ()
    assert await guard.raise_({bytes(32): session(LONG, ALICE4)}, LONG) == {}  # type: ignore[dict-item]
    assert (contents := await guard.read()) is not None
    assert (contents.faults, contents.lease is None) == ((), False)
    assert await stand.answers(ALICE4, GATEWAY4)
    await guard.dismiss([parse_prefix(ALICE4)])
    assert not await stand.answers(ALICE4, GATEWAY4)


@in_gateway
async def test_a_change_among_25000_peers_takes_as_long_as_among_ten(stand: Stand) -> None:
    many = {
        PublicKey(i.to_bytes(32)): session(LONG, f"10.{32 + (i >> 16)}.{i >> 8 & 255}.{i & 255}")
        for i in range(25_000)
    }
    last = PublicKey(bytes([255]) * 32)
    guard = stand.firewall()

    async def admitting(peers: dict[PublicKey, Admission], renewals: int = 0) -> float:
        took = []
        for _ in range(max(1, renewals)):
            began = time.monotonic()
            assert await guard.admit(peers) == {}
            if renewals:
                await guard.renew_lease(LONG)
            took.append(time.monotonic() - began)
        return statistics.median(took)

    await guard.raise_({}, LONG)
    # Somebody listens for changes, as the agent does: the kernel would tell of each element.
    listener = asyncio.create_task(guard.disturbed())
    await admitting(dict(list(many.items())[:10]))
    among_ten = await admitting({last: session(LONG, ALICE4)}, 40)
    thousand = await admitting(dict(list(many.items())[:1000]))
    since = time.monotonic()
    assert await admitting(many) < 25 * 4 * thousand
    began = time.monotonic()
    assert await admitting({last: session(LONG, ALICE4)}, 40) < 3 * among_ten
    contents = await guard.read()
    assert contents is not None
    passed = time.monotonic() - began + contents.spread
    lives = [contents.elements[prefix] or 0.0 for a in many.values() for prefix in a.prefixes]
    assert len(lives) == len(many)
    assert LONG - (time.monotonic() - since) - contents.spread - 1 < min(lives)
    assert max(lives) <= LONG
    assert contents.elements[parse_prefix(ALICE4)] == pytest.approx(LONG, abs=passed + 1)
    assert not listener.done()
    await stand.nft("flush", "ruleset")
    await asyncio.wait_for(listener, 5)


@in_gateway
async def test_the_table_is_made_with_more_peers_than_one_transaction_takes(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.guardwriter._BATCH", 40)
    peers = {PublicKey(i.to_bytes(32)): session(LONG, f"10.32.0.{i}") for i in range(100)}
    guard = stand.firewall()
    assert await guard.raise_(peers, LONG) == {}
    assert compare(peers, await guard.read(), lease_demanded=True).drift == ()
    await guard.dismiss([p for a in peers.values() for p in a.prefixes])
    assert (contents := await guard.read()) is not None
    assert contents.elements == {}


class Slow(nft.Program):
    """Real nft on a host that takes 2 ms for each element, to write it and to list it."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0.0

    def read(self, table: str, name: str) -> dict[bytes, float | None]:
        listed = super().read(table, name)
        time.sleep(0.002 * sum(left is not None for left in listed.values()))
        return listed

    def write(self, table: str, changes: Iterable[ElementChange]) -> None:
        began, changes = time.monotonic(), list(changes)
        time.sleep(0.002 * sum(life is not None for change in changes for life in change.elements.values()))
        super().write(table, changes)
        self.longest = max(self.longest, time.monotonic() - began)


@in_gateway
async def test_on_a_slow_host_elements_end_no_later_than_their_sessions(stand: Stand) -> None:
    many = {PublicKey(i.to_bytes(32)): session(LONG, f"10.32.{i >> 8}.{i & 255}") for i in range(1200)}
    guard = stand.firewall(slow := Slow())

    async def stands(since: float, *, late: float) -> None:
        """By nft's own listing, which takes no time to speak of."""
        listed = await stand.ours()
        left = since + LONG - time.monotonic()
        held = [seconds(lasts) for lasts in re.findall(r"10\.32\S+ timeout \S+ expires (\w+)", listed)]
        assert len(held) == len(many)
        assert max(held) < left + late

    # How slow it is shows with the first part, which is written again: on time.
    began = time.monotonic()
    assert await guard.raise_(many, LONG) == {}
    assert 1 < slow.longest < 2
    await stands(began, late=1)
    slow.longest = 0.0
    began = time.monotonic()
    assert await guard.admit(many) == {}
    assert 0.1 < slow.longest < 1
    await stands(began, late=1)

    # The agent's own look takes as long, and takes nothing of it for somebody else's doing.
    contents = await guard.read()
    left = began + LONG - time.monotonic()
    wanted = {key: admission._replace(remaining=left) for key, admission in many.items()}
    assert contents is not None
    assert contents.spread > 2
    assert compare(wanted, contents, lease_demanded=True).drift == ()
    assert max(filter(None, contents.elements.values())) < left + 0.5


def seconds(text: str) -> float:
    """Of a time as nft prints it, such as 9m58s340ms."""
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)(ms|[dhms])", text))


@in_gateway
async def test_a_prefix_that_is_none_is_refused_and_never_reaches_nft(stand: Stand) -> None:
    odd = Admission((parse_prefix(ALICE4)._replace(packed=b"\x01"),), 5)
    long = Admission((parse_prefix(ALICE4)._replace(length=33),), None)
    guard = stand.firewall()
    one, two, three = (PublicKey(bytes([i]) * 32) for i in range(3))
    refused = await guard.raise_({one: odd, two: long, three: session(9, ALICE4)}, LONG)
    assert refused == dict.fromkeys((one, two), "one of its prefixes is none")


class Refusing:
    """nftables on a kernel that lacks something: what can't be had on one machine."""

    port: int | None = None

    def __init__(self, *words: str, reason: str = "Could not process rule: Operation not supported") -> None:
        self._words = words
        self._reason = reason

    def run(self, commands: str, *, dry_run: bool = False) -> str:
        if any(word in commands for word in self._words):
            raise NftError(f"nftables: {self._reason}")
        return ""

    def write(self, table: str, changes: Iterable[ElementChange]) -> None:
        """It takes elements."""

    def read(self, table: str, name: str) -> dict[bytes, float | None]:
        return {}

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("hook ingress",), ["inet chains at the ingress hook"]),
        (("timeout",), ["sets whose elements time out"]),
        (("hook postrouting", "timeout"), ["sets whose elements time out", "inet chains in postrouting"]),
        (("jump",), ["the kernel refuses the guard's table"]),
        (("list tables",), ["the kernel does not answer for nftables"]),
    ],
)
def test_what_the_kernel_lacks_is_named(words: tuple[str, ...], said: list[str]) -> None:
    lacks = asyncio.run(Firewall("wg0", Refusing(*words)).support())
    assert len(lacks) == len(said)
    for lack, words_ in zip(lacks, said, strict=True):
        assert words_ in lack.message
        assert lack.hint


def test_a_name_that_nft_can_not_quote_is_named() -> None:
    assert "can't name" in asyncio.run(Firewall('wg"0', Refusing()).support())[0].message


@in_gateway
async def test_nobody_is_tried_on_and_on_when_nothing_can_be_admitted(stand: Stand) -> None:
    class Full(nft.Program):
        tries = 0

        def write(self, table: str, changes: Iterable[ElementChange]) -> None:
            self.tries += 1
            raise NftError("nftables: Cannot allocate memory")

    full = Full()
    guard = stand.firewall()
    await guard.raise_({}, LONG)
    assert guard._own._nft is not None
    guard._own._nft.close()
    guard._own._nft = full
    many = {PublicKey(i.to_bytes(32)): session(LONG, f"10.32.{i >> 8}.{i & 255}") for i in range(5000)}
    with pytest.raises(GuardError, match=r"no peer can be admitted: .*Cannot allocate memory"):
        await guard.admit(many)
    assert full.tries < 300


def test_missing_permission_is_named() -> None:
    script = (
        "import asyncio; from agent.firewall import Firewall;"
        "print(asyncio.run(Firewall('wg0').support())[0].message)"
    )
    with Network() as net:
        done = net.namespace("plain").run(
            *("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"),
            *("env", f"PYTHONPATH={Path(nft.__file__).parents[1]}", sys.executable, "-c", script),
        )
    assert "CAP_NET_ADMIN is missing" in done.stdout


def test_without_the_library_the_program_is_used_and_without_either_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nft, "_LIBRARY", "libnftables.so.999")
    assert isinstance(nft.open_nft(), nft.Program)
    monkeypatch.setattr(nft, "_PROGRAM", "nft-that-is-not-there")
    lack = asyncio.run(Firewall("wg0").support())[0]
    assert "libnftables.so.999 is not there" in lack.message
    assert "apt install nftables" in lack.hint


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@in_gateway
async def test_nothing_is_left_open(stand: Stand) -> None:
    before = descriptors()
    for _ in range(3):
        guard = Firewall(stand.name)
        await guard.raise_({}, LONG)
        listener = asyncio.create_task(guard.disturbed())
        await asyncio.sleep(0.05)
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        guard.close()
    assert descriptors() == before


@pytest.fixture
def usr1_is_handled() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("usr1_is_handled")
@in_gateway
async def test_signals_do_not_interrupt_what_is_asked_of_the_kernel(stand: Stand) -> None:
    guard = Firewall(stand.name)
    await guard.raise_({}, LONG)
    thread = await guard._own.do(threading.get_ident)
    over = threading.Event()

    def storm() -> None:
        while not over.wait(0.0003):
            signal.pthread_kill(thread, signal.SIGUSR1)

    sender = threading.Thread(target=storm)
    sender.start()
    try:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            await guard.renew_lease(LONG)
            assert await guard.read() is not None
    finally:
        over.set()
        sender.join()
        guard.close()


@in_gateway
async def test_a_kernel_that_does_not_answer_does_not_keep_the_guard_from_being_let_go_of(
    stand: Stand,
) -> None:
    answered = threading.Event()
    guard = Firewall(stand.name)
    await guard.raise_({}, LONG)
    hanging = asyncio.ensure_future(guard._own.do(lambda: answered.wait(30)))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    guard.close()
    assert time.monotonic() - began < 5
    answered.set()
    await hanging
