"""``python -m agent.sandbox exercise``; every change that it makes is seen in tests/conformance."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.sandbox.__main__ import main
from tests.sandbox.parts import Scene, new_key, run, served_scene


async def exercise(s: Scene, folder: Path, *argv: str) -> int:
    token = folder / "admin.token"
    token.write_text(s.service.config.admin.token or "")
    given = ["exercise", "--core", s.service.url, "--admin-token-file", str(token), "--location", "hq", *argv]
    return await asyncio.to_thread(main, given)


def test_it_has_core_make_the_change_and_ends_with_0(tmp_path: Path) -> None:
    async def main() -> None:
        async with served_scene() as s:
            key = new_key()
            assert await exercise(s, tmp_path, "upsert", key) == 0
            device = (await s.service.admin.devices("hq"))[-1]
            assert (device["public_key"], device["mfa_exempt"]) == (key, False)
            mtu = []
            for _ in range(3):
                assert await exercise(s, tmp_path, "location") == 0
                mtu.append((await s.gateway.state())["interface"]["mtu"])
            assert mtu == [1420, 1400, 1420]

    run(main())


@pytest.mark.parametrize("argv", [["restart"], ["new-history"], ["fly"], ["grant"], ["move", "one"]])
def test_what_it_has_no_way_to_do_ends_with_77(argv: list[str], tmp_path: Path) -> None:
    async def main() -> None:
        async with served_scene() as s:
            assert await exercise(s, tmp_path, *argv) == 77
            assert len(await s.service.admin.devices("hq")) == 1

    run(main())


@pytest.mark.parametrize("argv", [["renew"], ["revoke"], ["remove"]])
def test_a_change_that_core_refuses_ends_with_1_and_the_reason(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        async with served_scene() as s:
            assert await exercise(s, tmp_path, *argv, new_key()) == 1

    run(main())
    assert f"{argv[0]} failed" in capsys.readouterr().err


def test_a_core_that_is_not_there_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "admin.token"
    token.write_text("t")
    argv = ["exercise", "--core", "http://127.0.0.1:1", "--admin-token-file", str(token), "--location", "hq"]
    assert main([*argv, "location"]) == 1
    assert "is core there" in capsys.readouterr().err
