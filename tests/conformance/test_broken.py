"""A core that breaks one clause fails at that clause, and at no other."""

from __future__ import annotations

import asyncio

import pytest

from agent.conformance.verdicts import Ledger, Mark
from tests.conformance.broken import BROKEN, GOOD, Proxy, served
from tests.conformance.site import marked, site, walk

_AT_ONCE = 12
pytestmark = pytest.mark.timeout(300)  # the first of them waits for all walks


async def _walk_through(kind: type[Proxy], turn: asyncio.Semaphore) -> Ledger:
    async with turn, site() as core, served(kind(core)) as proxy:
        return await walk(proxy.url, core.service.gateway_token, proxy.exercise)


KINDS: list[type[Proxy]] = [*GOOD, *BROKEN]


@pytest.fixture(scope="module")
def ledgers() -> dict[type[Proxy], Ledger]:
    """The walks through all of them, some at once: each is mostly waiting."""

    async def main() -> list[Ledger]:
        turn = asyncio.Semaphore(_AT_ONCE)
        return await asyncio.gather(*(_walk_through(kind, turn) for kind in KINDS))

    return dict(zip(KINDS, asyncio.run(main()), strict=True))


@pytest.mark.parametrize("kind", GOOD, ids=[kind.__name__ for kind in GOOD])
def test_a_core_that_does_what_it_may_keeps_every_clause(
    kind: type[Proxy], ledgers: dict[type[Proxy], Ledger]
) -> None:
    assert marked(ledgers[kind], Mark.FAIL) == {}
    assert marked(ledgers[kind], Mark.SKIP) == {}


@pytest.mark.parametrize(("kind", "clause"), BROKEN.items(), ids=[kind.__name__ for kind in BROKEN])
def test_a_broken_core_fails_at_its_clause_alone(
    kind: type[Proxy], clause: str, ledgers: dict[type[Proxy], Ledger]
) -> None:
    assert set(marked(ledgers[kind], Mark.FAIL)) == {clause}, marked(ledgers[kind], Mark.FAIL)
