"""A TCP proxy whose connections can be frozen: both ends keep theirs, and nothing passes any more."""

import asyncio
import contextlib


class StallingProxy:
    """Passes on to ``target`` on loopback; connections made before ``stall`` are frozen by it."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._frozen = False
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def stall(self) -> None:
        """From now on nothing passes, no end of a connection either."""
        self._frozen = True

    async def stop_listening(self) -> None:
        """Nobody new gets in."""
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, far_writer]
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self._frozen:
                    await asyncio.Event().wait()
                writer.write(data)
        if self._frozen:
            await asyncio.Event().wait()
        writer.close()
