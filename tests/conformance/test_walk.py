"""Cores of other kinds: over TLS, without a stream, without anything to go by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from agent.conformance.asking import background
from agent.conformance.clauses import CLAUSES
from agent.conformance.history import STEPS
from agent.conformance.verdicts import Ledger, Mark
from agent.conformance.walk import Walk
from agent.conformance.wire import Wire
from agent.core.endpoint import TlsFiles
from agent.errors import ConfigError, CoreUnavailable
from agent.sandbox.service import CoreService, make_config
from tests.conformance.broken import HasNoChanges, served
from tests.conformance.site import HEARTBEAT, LOCATION, Site, marked, site, walk
from tests.core.fakes import Request, answer, body, core, run, state, stream


def test_over_tls_core_is_trusted_by_its_ca_alone(tmp_path: Path) -> None:
    ca, other = trustme.CA(), trustme.CA()
    issued = ca.issue_cert("127.0.0.1")
    for pem, name in (
        (ca.cert_pem, "ca.pem"),
        (other.cert_pem, "other.pem"),
        (issued.cert_chain_pems[0], "cert.pem"),
        (issued.private_key_pem, "key.pem"),
    ):
        pem.write_to_path(str(tmp_path / name))
    settings = make_config(
        tmp_path,
        heartbeat=HEARTBEAT,
        tls_cert_file=str(tmp_path / "cert.pem"),
        tls_key_file=str(tmp_path / "key.pem"),
    )

    async def through(service: CoreService, ca_file: str) -> Ledger:
        wire = Wire(service.gateway_url, service.gateway_token, TlsFiles(tmp_path / ca_file))
        ledger = Ledger()
        await Walk(wire, service.gateway_token, ledger).run()
        await wire.close()
        return ledger

    async def main() -> None:
        service = CoreService(settings, ca_file=str(tmp_path / "ca.pem"))
        await service.start()
        try:
            await service.admin.add_location("hq", **LOCATION)
            assert marked(await through(service, "ca.pem"), Mark.FAIL) == {}
            failed = marked(await through(service, "other.pem"), Mark.FAIL)
        finally:
            await service.close()
        assert list(failed) == ["connection.reachable"]
        assert "not trusted by this host (set core.ca_file" in failed["connection.reachable"]

    run(main())


def test_a_core_without_a_stream_is_polled_and_its_sessions_are_judged_all_the_same() -> None:
    async def main() -> None:
        async with site(stream=False) as polled:
            ledger = await walk(polled.service.gateway_url, polled.service.gateway_token, polled)
        assert marked(ledger, Mark.FAIL) == {}
        skipped = marked(ledger, Mark.SKIP)
        assert set(skipped) == {name for name in CLAUSES if name.startswith(("stream.", "change."))}
        assert skipped["stream.resume"] == "core has no stream (core answered 404), and is polled"

    asyncio.run(main())


def test_a_core_that_has_no_route_for_changes_is_polled_and_asks_for_tokens_all_the_same() -> None:
    async def main() -> None:
        async with site() as core, served(HasNoChanges(core)) as polled:
            ledger = await walk(polled.url, core.service.gateway_token)
        assert marked(ledger, Mark.FAIL) == {}
        assert {"auth.missing-token", "auth.wrong-token"} <= set(marked(ledger, Mark.PASS))

    asyncio.run(main())


@asynccontextmanager
async def stepping(core: Site, ledger: Ledger) -> AsyncIterator[Walk]:
    wire = Wire(core.service.gateway_url, core.service.gateway_token, TlsFiles())
    try:
        yield Walk(wire, core.service.gateway_token, ledger)
    finally:
        await wire.close()


def test_wherever_an_exercise_fails_nothing_of_it_stays_in_core() -> None:
    async def fails_at(last: str) -> None:
        ledger = Ledger()
        async with site() as core, stepping(core, ledger) as steps:

            async def exercise(action: str, *keys: str) -> bool:
                done = action != "remove" or last != "remove"
                done = done and await core(action, *keys)
                if action == last:
                    raise ConfigError(f"{last} ended with 1")
                return done

            before = await core.service.admin.devices("hq")
            with pytest.raises(ConfigError, match=f"{last} ended with 1"):
                await steps.run(exercise=exercise)
            after = await core.service.admin.devices("hq")
            there = {device["public_key"] for device in after} - {device["public_key"] for device in before}
            assert set(steps.left) == there
            assert len(there) == (2 if last == "remove" else 0)
        assert marked(ledger, Mark.FAIL) == {}
        assert ledger.mark("state.json") is ledger.mark("applied.accepted") is Mark.PASS
        assert ledger.verdict("restart.new-epoch").seen == f"not reached: {last} ended with 1"

    async def main() -> None:
        await asyncio.gather(*(fails_at(action) for action in [*STEPS, "restart"]))

    asyncio.run(main())


def test_a_program_that_can_not_remove_is_reported_by_what_it_left() -> None:
    async def main() -> None:
        async with site() as core, stepping(core, Ledger()) as steps:

            async def exercise(action: str, *keys: str) -> bool:
                return action not in {"remove", "new-history"} and await core(action, *keys)

            await steps.run(exercise=exercise)
            listed = {device["public_key"] for device in await core.service.admin.devices("hq")}
            assert len(steps.left) == 2
            assert listed > set(steps.left)

    asyncio.run(main())


def test_a_cancelled_walk_says_what_it_did_not_reach() -> None:
    async def main() -> Ledger:
        ledger = Ledger()
        async with site() as core, stepping(core, ledger) as steps:
            reached = asyncio.Event()

            async def exercise(action: str, *keys: str) -> bool:
                done = await core(action, *keys)
                if action == "grant":
                    reached.set()
                    await asyncio.sleep(600)
                return done

            before = await core.service.admin.devices("hq")
            task = asyncio.create_task(steps.run(exercise=exercise))
            await reached.wait()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert await core.service.admin.devices("hq") == before
        return ledger

    ledger = asyncio.run(main())
    assert marked(ledger, Mark.FAIL) == {}
    assert ledger.mark("change.peer-upserted") is Mark.PASS
    assert ledger.verdict("restart.continues").seen == "not reached: the check was interrupted"


def test_a_cancellation_that_comes_while_something_is_being_ended_is_not_lost() -> None:
    async def slow_to_end() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.2)

    async def main() -> None:
        async def work() -> None:
            async with background(slow_to_end()):
                await asyncio.sleep(0.05)

        task = asyncio.create_task(work())
        await asyncio.sleep(0.15)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())


def test_without_epoch_and_revision_only_the_state_and_the_token_are_judged() -> None:
    async def main() -> Ledger:
        async with core() as told:
            told.on("state", answer(200, body(state() | {"epoch": None}), Content_Type="application/json"))
            return await walk(told.url, "token")

    ledger = run(main())
    assert {"state.epoch", "auth.missing-token", "auth.wrong-token"} <= set(marked(ledger, Mark.FAIL))
    assert ledger.verdict("stream.opens").seen == "the state's epoch and revision can't be read"


def test_answers_that_are_cut_or_packed_otherwise_are_said_to_be() -> None:
    async def main() -> list[str]:
        seen = []
        async with core() as told:
            for handler in (
                answer(200, b"{}", Content_Encoding="br"),
                answer(200, b"\x1f\x8b\x08", Content_Encoding="gzip"),
                answer(200, b"{", Content_Length="10"),
            ):
                told.on("state", handler)
                ledger = await walk(told.url, "token")
                assert ledger.mark("state.gzip") is Mark.FAIL
                seen.append(ledger.verdict("state.gzip").seen)
        return seen

    brotli, gzip, cut = run(main())
    assert "Content-Encoding other than gzip" in brotli
    assert "gzip data ends early" in gzip
    assert "truncated" in cut


async def no_answer(_request: Request, _writer: asyncio.StreamWriter) -> None:
    """The connection is closed."""


def test_of_a_core_that_goes_away_the_rest_is_not_judged_but_said_not_to_be_reached() -> None:
    async def main() -> tuple[Ledger, str]:
        async with core() as told:
            told.on("state", answer(200, body(state(revision=0)), Content_Type="application/json"))

            async def goes(request: Request, writer: asyncio.StreamWriter) -> None:
                told.on("state", no_answer)
                await no_answer(request, writer)

            told.on("applied", *[answer(401)] * 3, answer(202), goes)
            ledger = Ledger()
            wire = Wire(told.url, "token", TlsFiles())
            with pytest.raises(CoreUnavailable) as gone:
                await Walk(wire, "token", ledger).run()
            await wire.close()
            return ledger, str(gone.value)

    ledger, said = run(main())
    assert said.startswith("core answers no more, since POST applied: ")
    assert ledger.verdict("connection.reachable") == (Mark.FAIL, said.partition(" (see why")[0])
    assert ledger.mark("state.json") is Mark.PASS
    for clause in ("applied.refused", "stats.accepted", "json.malformed-request", "errors.goes-on"):
        mark, seen = ledger.verdict(clause)
        assert mark is Mark.SKIP, clause
        assert seen.startswith("not reached: core answers no more"), seen


def test_a_core_that_drops_a_report_and_goes_on_fails_at_that_report() -> None:
    async def main() -> Ledger:
        async with core() as told:
            told.on("state", answer(200, body(state(revision=0)), Content_Type="application/json"))
            told.on("stats", no_answer)
            return await walk(told.url, "token")

    ledger = run(main())
    assert ledger.mark("connection.reachable") is Mark.PASS
    assert ledger.mark("stats.accepted") is Mark.FAIL
    assert "not reached" not in ledger.verdict("errors.goes-on").seen


def test_a_core_may_close_a_connection_whenever_it_has_answered() -> None:
    async def answers_once(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        await asyncio.sleep(1.0)  # what comes on it meanwhile is not read any more

    async def main() -> list[str]:
        async with core() as told:
            told.on("state", answers_once)
            wire = Wire(told.url, "token", TlsFiles())
            answers = [await wire.ask("GET", "state") for _ in range(3)]
            await wire.close()
            return [str(answer) for answer in answers]

    assert run(main()) == ["core answered 200"] * 3


def test_an_event_that_is_too_large_is_a_fault_of_the_stream() -> None:
    async def main() -> Ledger:
        good = state(revision=1)
        async with core() as told:
            etag = {"ETag": '"b7e1:1"', "Content_Type": "application/json"}
            told.on("state", answer(200, body(good), **etag))
            told.on("changes", stream(b"id: b7e1:2\nevent: peer_removed\ndata: " + b"x" * 2_000_000))
            return await walk(told.url, "token")

    ledger = run(main())
    assert ledger.mark("stream.data") is Mark.FAIL
    assert "more than 1048576 bytes" in ledger.verdict("stream.data").seen
