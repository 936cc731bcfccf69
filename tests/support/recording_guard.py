"""A guard in memory that records what is asked, in the host's log, and fails on demand."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from agent.errors import GuardDrifted, GuardError
from agent.guard import Admission, GuardContents
from agent.model import Prefix, PublicKey
from tests.support.heard import Heard
from tests.support.recording_device import Host


@dataclass
class RecordingGuard:
    """``table`` is what the kernel holds: None without a table, else each prefix with its seconds."""

    host: Host
    table: dict[Prefix, float | None] | None = None
    barred: set[Prefix] = field(default_factory=set)
    lease: float | None = None
    fails: bool = False
    refuses: frozenset[PublicKey] = frozenset()
    muted: int = 0
    was_muted: int = 0
    made: bool = False
    """Whether there is a table as far as the agent knows."""
    takes: Callable[[], object] | None = None
    """What a call waits for, in a thread, before anything is done."""

    def __post_init__(self) -> None:
        self.heard = Heard(lambda: (self.table and dict(self.table), self.table is None, set(self.barred)))

    async def _did(self, what: str, *about: object) -> None:
        if self.takes is not None:
            await asyncio.to_thread(self.takes)
        if self.fails:
            raise GuardError("nftables is not to be had", "install it")
        self.host.log.append((f"guard {what}", about))
        self.heard.before()

    async def read(self) -> GuardContents | None:
        await self._did("read")
        self.heard.touched = False
        self.heard.after()
        if self.table is None:
            return None
        return GuardContents(dict(self.table), frozenset(self.barred), self.lease, bool(self.lease))

    def untouched(self) -> bool:
        self.heard.before()
        return not self.heard.touched

    def mute(self) -> None:
        self.muted += 1
        self.was_muted += 1

    async def unmute(self) -> None:
        self.muted -= 1
        if self.made and self.table is None:
            raise GuardDrifted("the table is not whole: it is gone")

    async def raise_(
        self,
        admissions: Mapping[PublicKey, Admission],
        lease: float | None,
        there: Collection[PublicKey] = (),
    ) -> Mapping[PublicKey, str]:
        await self._did("raise", set(admissions))
        self.table, self.made = {} if self.table is None else self.table, True
        self.lease = lease
        return self._write(admissions)

    async def lower(self) -> bool:
        await self._did("lower")
        there, self.table, self.made = self.table is not None, None, False
        self.barred.clear()
        self.heard.after()
        return there

    async def admit(self, admissions: Mapping[PublicKey, Admission]) -> Mapping[PublicKey, str]:
        await self._did("admit", dict(admissions))
        return self._write(admissions)

    async def dismiss(self, prefixes: Iterable[Prefix]) -> None:
        gone = tuple(prefixes)
        await self._did("dismiss", gone)
        assert self.table is not None
        for prefix in gone:
            self.table.pop(prefix, None)
            self.barred.discard(prefix)
        self.heard.after()

    async def renew_lease(self, seconds: float | None) -> None:
        await self._did("lease", seconds)
        self.lease = seconds

    async def disturbed(self) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        self.host.log.append(("guard close", ()))

    def _write(self, admissions: Mapping[PublicKey, Admission]) -> dict[PublicKey, str]:
        assert self.table is not None
        for key, (prefixes, remaining, fresh) in admissions.items():
            if key in self.refuses:
                continue
            for prefix in prefixes:
                assert not (fresh and prefix in self.table), f"{prefix} is not fresh"
                self.table[prefix] = remaining
                (self.barred.discard if remaining is None else self.barred.add)(prefix)
        self.heard.after()
        return {key: "it is refused" for key in admissions if key in self.refuses}
