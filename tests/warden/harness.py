"""An agent with a guard whose elements run out, on a host whose time the test moves."""

import contextlib
import sqlite3
from collections.abc import Callable, Coroutine
from typing import Any

from agent.model import Prefix, PublicKey, Refusal
from agent.ports import Guard
from agent.warden import Warden
from tests.reconciler.harness import Agent, Core, World, run
from tests.support.builders import key, prefixes
from tests.support.timed_guard import TimedGuard

Scenario = Callable[[Agent, Core], Coroutine[Any, Any, None]]


class GuardedAgent(Agent):
    """An agent whose warden can be looked at."""

    warden: Warden

    def __init__(self, world: World, *, required: bool, lease: float) -> None:
        self._about = required, lease
        super().__init__(world)

    def _warden(self, guard: Guard) -> Warden:
        required, lease = self._about
        self.warden = Warden(
            state=self.state, guard=guard, read_clock=self.world.clock, required=required, lease=lease
        )
        return self.warden


class Gateway:
    """A host with a guard; time stands still unless the test moves it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slept = 0.0
        self.guard = TimedGuard(self.monotonic, world.host.log)

    def monotonic(self) -> float:
        return self.world.clock.now.boot - self.slept

    def suspend(self, seconds: float) -> None:
        self.world.clock.advance(seconds)
        self.slept += seconds

    def run(
        self, scenario: Scenario, *, kill: bool = False, required: bool = True, lease: float = 300
    ) -> None:
        self.world.guard = self.guard  # type: ignore[assignment]

        async def main() -> None:
            async with GuardedAgent(self.world, required=required, lease=lease) as agent:
                await scenario(agent, Core(self.world.clock))
                if kill:
                    agent.kill()

        run(main())

    def left(self, number: int) -> float | None:
        """Seconds for which 10.8.0.NUMBER is let through; None: for good, 0: not at all."""
        return self.guard.left(prefix(f"10.8.0.{number}"))

    def since(self, mark: int) -> list[str]:
        """What was done to guard and device, in words."""
        words = []
        for kind, what in self.world.host.log[mark:]:
            if kind == "operation":
                words.append(f"{type(what).__name__} {number(what.public_key)}")  # type: ignore[attr-defined]
            elif kind in {"guard: raise", "guard: admit"}:
                keys = " ".join(str(number(k)) for k in what)  # type: ignore[attr-defined]
                words.append(f"{kind[7:]} {keys}".rstrip())
            elif kind == "guard: dismiss":
                words.append(f"dismiss {' '.join(map(str, what))}")  # type: ignore[call-overload]
            elif kind in {"guard: lower", "up"}:
                words.append(kind.removeprefix("guard: "))
        return words

    def mark(self) -> int:
        return len(self.world.host.log)

    def lose_journal(self) -> None:
        for file in self.world.folder.glob("journal*"):
            file.unlink()

    def unlist(self, number: int) -> None:
        """The journal has the peer's session and not the peer, as after a SIGKILL between the two."""
        with contextlib.closing(sqlite3.connect(self.world.folder / "journal.sqlite")) as journal, journal:
            journal.execute("DELETE FROM peers WHERE public_key = ?", (key(number),))


def prefix(text: str) -> Prefix:
    return prefixes(text)[0]


def number(public_key: PublicKey) -> int:
    return int.from_bytes(public_key, "big")


def refusals(agent: Agent) -> dict[PublicKey, Refusal]:
    return dict(agent.state.roster.refused)


def fault(agent: Agent) -> str:
    assert isinstance(agent, GuardedAgent)
    return agent.warden.fault
