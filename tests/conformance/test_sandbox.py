"""The sandbox core keeps to every clause of the core API."""

from __future__ import annotations

import asyncio

from agent.conformance.clauses import CLAUSES
from agent.conformance.verdicts import Mark
from tests.conformance.site import marked, site, walk


def test_the_sandbox_core_keeps_every_clause() -> None:
    async def main() -> None:
        async with site() as core:
            ledger = await walk(core.service.gateway_url, core.service.gateway_token, core)
        assert marked(ledger, Mark.FAIL) == {}
        assert marked(ledger, Mark.SKIP) == {}
        assert set(marked(ledger, Mark.PASS)) == set(CLAUSES)

    asyncio.run(main())
