import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from agent.sandbox.admin import AdminClient
from agent.sandbox.app import UNACKNOWLEDGED
from tests.sandbox.parts import run
from tests.support.netns import Namespace, Network

DROPPED = """
table inet cut {
  chain input { type filter hook input priority filter; tcp dport 8480 drop; tcp sport 8480 drop; }
}
"""


async def streams(folder: Path) -> int:
    async with AdminClient(f"http+unix://{folder}/core.sock:", "admin") as admin:
        [gateway] = await admin.gateways()
        return int(gateway["streams"])


def start_core(space: Namespace, folder: Path) -> "subprocess.Popen[bytes]":
    """A core in a namespace of its own, whose admin API is reached from outside."""
    (folder / "core.toml").write_text(
        f"""
database = "{folder}/db/core.db"
listen = ["127.0.0.1:8480", "unix:{folder}/core.sock"]
heartbeat = 1
[admin]
token = "admin"
[[gateways]]
name = "gw1"
location = "hq"
token = "one"
"""
    )
    argv = (sys.executable, "-m", "agent.sandbox", "core", "--config", str(folder / "core.toml"))
    return space.popen(*argv, stdout=subprocess.PIPE)


@contextmanager
def killed_at_the_end(process: "subprocess.Popen[bytes]") -> Iterator[IO[bytes]]:
    """Give what it prints."""
    assert process.stdout is not None
    with process:
        try:
            yield process.stdout
        finally:
            process.kill()


@pytest.mark.netns
def test_a_gateway_that_died_without_a_word_is_there_no_longer(tmp_path: Path) -> None:
    async def main(space: Namespace) -> None:
        async with AdminClient(f"http+unix://{tmp_path}/core.sock:", "admin") as admin:
            await admin.add_location("hq", addresses=["10.8.0.1/24"])
        url = "http://127.0.0.1:8480/gateway/v1/changes"
        stream = space.popen("curl", "-sN", "-H", "authorization: Bearer one", url, stdout=subprocess.PIPE)
        with killed_at_the_end(stream) as lines:
            assert lines.readline() == b": stream\n"
            assert await streams(tmp_path) == 1
            space.run("nft", "-f", "-", stdin=DROPPED)
            async with asyncio.timeout(UNACKNOWLEDGED + 15):
                while await streams(tmp_path):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
            # Not because the other end had hung up.
            assert stream.poll() is None

    with Network() as network:
        space = network.namespace("core")
        core = start_core(space, tmp_path)
        with killed_at_the_end(core) as lines:
            assert b"127.0.0.1:8480" in lines.readline()
            run(main(space))
