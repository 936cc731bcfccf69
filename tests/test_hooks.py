"""Real commands, as the operator would write them."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent import config, hooks
from agent.errors import DeviceError
from agent.hooks import Failure, Hooks, When, environment
from tests.support.site import until


def section(**lists: Any) -> config.Hooks:
    return config.Hooks.model_validate(lists)


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def ran(*argv: str, timeout: float = 10.0) -> list[Failure]:
    """What became of one command."""
    commands = Hooks(section(pre_down=[list(argv)], timeout=timeout), "wg0")
    return asyncio.run(commands.run(When.PRE_DOWN))


def reason(*argv: str, timeout: float = 10.0) -> str:
    (failure,) = ran(*argv, timeout=timeout)
    return failure.reason


def output(*argv: str) -> str:
    (failure,) = ran(*argv)
    return failure.output


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_command_gets_its_words_as_they_are_and_no_shell_reads_them(tmp_path: Path) -> None:
    words = ["a b", "$HOME", "*", ";", "'", ""]

    path = tmp_path / "argv"
    assert (
        ran(*python("import sys; open(sys.argv[1], 'w').write(repr(sys.argv[2:]))", str(path), *words)) == []
    )
    assert path.read_text() == repr(words)


@pytest.mark.parametrize(
    ("word", "got"),
    [
        ("%i", "wg0"),
        ("dev=%i,%i", "dev=wg0,wg0"),
        ("%%i", "%i"),
        ("100%", "100%"),
        ("%d%", "%d%"),
        ("%%%i", "%wg0"),
        ("%%%%", "%%"),
    ],
)
def test_percent_i_is_the_interfaces_name(word: str, got: str) -> None:
    assert output(*python("import sys; sys.exit(sys.argv[1])", word)) == got


def test_a_command_reads_nothing_and_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WG_AGENT_CORE__TOKEN_FILE", "s3cret")
    monkeypatch.setenv("wg_agent_log__level", "s3cret")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "s3cret")
    monkeypatch.setenv("NOTIFY_SOCKET", "s3cret")
    code = "import os, sys; sys.exit(repr((sys.stdin.read(), 's3cret' in str(os.environ))))"

    assert output(*python(code)) == "('', False)"
    assert environment({"PATH": "/bin", "WG_AGENT_X": "1", "INVOCATION_ID": "1"}) == {
        "PATH": "/bin",
        "INVOCATION_ID": "1",
    }


def test_a_command_that_fails_is_told_with_its_status_and_what_it_said() -> None:
    (failure,) = ran("sh", "-c", "echo out; echo err >&2; exit 3")

    assert str(failure) == "hooks.pre_down, command 1 (sh) ended with status 3: out err"


def test_a_command_that_cannot_be_started_is_told_with_the_reason(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")

    assert reason("no-such-program") == "can't be started: No such file or directory"
    assert reason(str(plain)) == "can't be started: Permission denied"
    assert reason("true", "\ud800").startswith("can't be started: 'utf-8' codec can't encode")


def test_a_command_that_is_killed_by_somebody_is_told_with_the_signal() -> None:
    assert reason("sh", "-c", "kill -TERM $$") == "was ended by signal 15 (Terminated)"


def test_a_command_that_takes_too_long_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    began = time.monotonic()

    why = reason("sh", "-c", f"sleep 60 & echo $! $$ > {pids}; wait", timeout=1.0)

    assert why == "took longer than 1 s and was killed"
    assert time.monotonic() - began < 5
    for pid in map(int, pids.read_text().split()):
        until(lambda pid=pid: gone(pid), 5, "the end of what was killed")  # type: ignore[misc]


def test_what_a_command_leaves_running_is_neither_waited_for_nor_killed(tmp_path: Path) -> None:
    path = tmp_path / "later"
    began = time.monotonic()

    async def scenario() -> None:
        # It prints after its parent has ended, to a pipe that somebody has to read still.
        late = f"(sleep 0.5; echo late; echo late; touch {path}) &"
        assert await Hooks(section(pre_down=[["sh", "-c", late]]), "wg0").run(When.PRE_DOWN) == []
        assert time.monotonic() - began < 0.5
        await asyncio.to_thread(until, path.exists, 5)

    asyncio.run(scenario())


def test_a_talkative_command_leaves_others_their_turn() -> None:
    async def work() -> None:
        commands = Hooks(section(pre_down=[["yes"]], timeout=1), "wg0")
        running = asyncio.create_task(commands.run(When.PRE_DOWN))
        longest, last = 0.0, time.monotonic()
        while not running.done():
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        (failure,) = running.result()
        assert failure.reason == "took longer than 1 s and was killed"
        assert longest < 0.5

    asyncio.run(work())


def test_of_much_output_the_end_is_told() -> None:
    said = output("sh", "-c", "seq 1 200000; exit 1")

    assert said.endswith("199999 200000")
    assert len(said) == 1000


def test_keys_are_told_in_no_form_and_no_part() -> None:
    key = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="
    raw = "c80273e5317e9575c9b5ed78b638b7ce530dabe85ddab61422024180 1ddf0669".replace(" ", "")

    assert output("sh", "-c", f"echo preshared-key={key} {raw} x; exit 1") == (
        "preshared-key=(redacted) (redacted) x"
    )


@pytest.mark.parametrize("left", [1, 20, 43])
def test_of_a_key_that_the_end_of_the_output_begins_in_nothing_is_told(left: int) -> None:
    key = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="
    code = f"print('{key}' + ' ' * {hooks._KEPT - left - len('end ')} + 'end'); raise SystemExit(1)"

    assert output(*python(code)) == "end"


def test_one_failure_does_not_keep_the_next_command_from_running(tmp_path: Path) -> None:
    commands = Hooks(section(post_down=[["false"], ["touch", str(tmp_path / "%i")]]), "wg0")

    (failure,) = asyncio.run(commands.run(When.POST_DOWN))

    assert failure.reason == "ended with status 1"
    assert (tmp_path / "wg0").exists()


# Coming up.


class Up:
    """An interface that is to come up: each command writes its name into a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wakes = 0
        self.lists: dict[str, list[list[str]]] = {
            when.value: [["sh", "-c", f"echo {when} >> {folder}/ran"]] for when in When
        }
        self._hooks: Hooks | None = None

    @property
    def hooks(self) -> Hooks:
        if self._hooks is None:
            self._hooks = Hooks(section(**self.lists), "wg0", self._woken)
        return self._hooks

    def _woken(self) -> None:
        self.wakes += 1

    def ran(self) -> list[str]:
        path = self.folder / "ran"
        return path.read_text().split() if path.exists() else []

    async def comes_up(self, link: int) -> None:
        """Ask at each tick, as the keeper does."""
        for _ in range(500):
            if self.hooks.may_come_up(link):
                self.hooks.came_up()
                return
            await asyncio.sleep(0.01)
        raise TimeoutError

    async def has_run(self, *names: str) -> None:
        for _ in range(500):
            if self.ran() == [*names]:
                return
            await asyncio.sleep(0.01)
        assert self.ran() == [*names]


@pytest.fixture
def up(tmp_path: Path) -> Up:
    return Up(tmp_path)


def scenario(up: Up, work: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await work()
        await up.hooks.close()

    asyncio.run(run())


def test_without_commands_an_interface_comes_up_at_once() -> None:
    commands = Hooks(config.Hooks(), "wg0")

    assert commands.may_come_up(7) is True
    commands.came_up()


def test_pre_up_runs_before_and_post_up_after_it_has_come_up(up: Up) -> None:
    async def work() -> None:
        assert up.hooks.may_come_up(7) is False
        await up.has_run("pre_up")
        await up.comes_up(7)
        await up.has_run("pre_up", "post_up")
        assert up.wakes >= 1

    scenario(up, work)


def test_an_interface_that_is_found_up_has_had_its_commands(up: Up) -> None:
    async def work() -> None:
        up.hooks.found_up(7)
        await up.hooks.close()
        assert up.ran() == []

    scenario(up, work)


def test_commands_run_once_in_the_life_of_a_link(up: Up) -> None:
    async def work() -> None:
        await up.comes_up(7)
        await up.has_run("pre_up", "post_up")
        # Somebody takes it down.
        assert up.hooks.may_come_up(7) is True
        up.hooks.came_up()
        await up.hooks.close()
        assert up.ran() == ["pre_up", "post_up"]

    scenario(up, work)


def test_an_interface_that_is_taken_down_does_not_wait_for_its_post_up(up: Up) -> None:
    up.lists["post_up"] = [["sleep", "1"]]

    async def work() -> None:
        await up.comes_up(7)
        assert up.hooks.may_come_up(7) is True

    scenario(up, work)


@pytest.mark.parametrize("found", [False, True])
def test_a_link_that_was_up_and_is_made_again_gets_post_down_first(up: Up, *, found: bool) -> None:
    before = [] if found else ["pre_up", "post_up"]

    async def work() -> None:
        if found:
            up.hooks.found_up(7)
        else:
            await up.comes_up(7)
        await up.has_run(*before)
        await up.comes_up(8)
        await up.has_run(*before, "post_down", "pre_up", "post_up")

    scenario(up, work)


def test_a_pre_up_that_fails_keeps_the_interface_down_until_it_succeeds_and_no_other_runs_twice(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "AGAIN", 0.1)
    up.lists["pre_up"] += [
        ["test", "-e", str(up.folder / "ready")],
        ["sh", "-c", f"echo third >> {up.folder}/ran"],
    ]

    async def work() -> None:
        with pytest.raises(
            DeviceError, match=r"wg0 stays down: hooks.pre_up, command 2 \(test\) ended with status 1"
        ):
            await up.comes_up(7)
        await asyncio.sleep(0.3)
        with pytest.raises(DeviceError, match="stays down"):
            up.hooks.may_come_up(7)
        (up.folder / "ready").touch()
        while up.ran() != ["pre_up", "third"]:
            with contextlib.suppress(DeviceError):
                up.hooks.may_come_up(7)
            await asyncio.sleep(0.02)
        await up.comes_up(7)
        await up.has_run("pre_up", "third", "post_up")

    scenario(up, work)


def test_what_fails_afterwards_keeps_nothing_down_and_the_rest_runs(up: Up) -> None:
    up.lists["post_up"].insert(0, ["false"])
    up.lists["post_down"].insert(0, ["false"])

    async def work() -> None:
        await up.comes_up(7)
        await up.has_run("pre_up", "post_up")
        await up.comes_up(8)
        await up.has_run("pre_up", "post_up", "post_down", "pre_up", "post_up")

    scenario(up, work)


def test_an_operator_who_brings_it_up_by_hand_ends_the_waiting(up: Up) -> None:
    up.lists["pre_up"] = [["false"]]

    async def work() -> None:
        with pytest.raises(DeviceError):
            await up.comes_up(7)
        up.hooks.found_up(7)
        assert up.hooks.may_come_up(7) is True

    scenario(up, work)


def test_commands_for_a_link_that_has_gone_do_not_hold_up_the_next(up: Up) -> None:
    pid = up.folder / "pid"
    up.lists["post_up"] = [["sh", "-c", f"echo $$ > {pid}; exec sleep 60"]]

    async def work() -> None:
        await up.comes_up(7)
        await asyncio.to_thread(until, lambda: pid.exists() and pid.read_text(), 5)
        first = int(pid.read_text())
        pid.unlink()
        await up.comes_up(8)
        assert up.ran() == ["pre_up", "post_down", "pre_up"]
        assert gone(first)
        await asyncio.to_thread(until, lambda: pid.exists() and pid.read_text(), 5)
        up.hooks.found_up(9)

    scenario(up, work)


def test_a_link_that_goes_before_its_commands_have_begun_does_not_hold_up_the_next(up: Up) -> None:
    async def work() -> None:
        assert up.hooks.may_come_up(7) is False
        assert up.hooks.may_come_up(8) is False
        await up.comes_up(8)
        await up.has_run("pre_up", "post_up")

    scenario(up, work)


def test_a_pre_up_that_cannot_be_run_for_whatever_reason_keeps_the_interface_down(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no thread can be started")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", broken)

    async def work() -> None:
        with pytest.raises(DeviceError, match="can't be started: no thread can be started"):
            await up.comes_up(7)

    scenario(up, work)


def test_an_agent_that_stops_gives_commands_a_moment_and_then_ends_them(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "_STOP", 0.5)
    pid = up.folder / "pid"
    up.lists["post_up"] = [
        ["sh", "-c", f"sleep 0.2; echo post_up >> {up.folder}/ran"],
        ["sh", "-c", f"echo $$ > {pid}; sleep 60"],
    ]

    async def work() -> None:
        await up.comes_up(7)
        await up.hooks.close()
        assert up.ran() == ["pre_up", "post_up"]

    scenario(up, work)
    until(lambda: gone(int(pid.read_text())), 5)
