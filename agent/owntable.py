"""One nftables table of ours: the thread that works on it, nft in it, and what nft lists of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from agent import nftlist
from agent.errors import GuardError
from agent.nft import Nft, Worker, open_nft
from agent.nftelements import ElementChange
from agent.nftlist import Listing

T = TypeVar("T")


class OwnTable:
    """An inet table of ours; what raises, raises GuardError, and NftError where nft refuses.

    ``name`` gives the table's name, and may raise ValueError; nothing is asked of it before the first use.
    ``nft`` is opened at the first use, too. All but ``do`` and ``close`` blocks and belongs in ``do``.
    """

    def __init__(self, name: Callable[[], str], nft: Nft | None = None) -> None:
        self._name = name
        self._nft = nft
        self._worker = Worker()

    async def do(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns in the table's thread; begun, it is done to its end."""
        return await self._worker.do(work)

    def close(self) -> None:
        """Let go of nftables; the table stays."""
        self._worker.close(self._nft)

    @property
    def port(self) -> int | None:
        """The netlink port that our changes of elements come from; None before the first."""
        return None if self._nft is None else self._nft.port

    @property
    def address(self) -> str:
        """The table as commands address it."""
        return f"inet {self._name()}"

    def run(self, commands: Iterable[str] | str, *, dry_run: bool = False) -> str:
        """Carry out commands in one transaction, on whatever table; return what they print."""
        text = commands if isinstance(commands, str) else "\n".join(commands)
        return self._open().run(f"{text}\n", dry_run=dry_run) if text else ""

    def write(self, changes: Iterable[ElementChange]) -> None:
        """Change elements in one transaction."""
        self._open().write(self._name(), changes)

    def read(self, set_name: str) -> dict[bytes, float | None]:
        """Return a set's elements with the seconds that are left of each, None where it has no time."""
        return self._open().read(self._name(), set_name)

    def listing(self) -> Listing | None:
        """The table as it is, without elements; None without one. GuardError for one that is not ours."""
        name = self.address
        # Asked for by name, nft 1.0.6 fetches all elements of all tables, and an error tells nothing.
        text = nftlist.table_part(self.run("list ruleset inet"), name)
        if text is None:
            return None
        try:
            listing = nftlist.parse(text)
        except ValueError as error:
            raise GuardError(
                f"the table {name} can't be read: {error}", "report it with nft's version"
            ) from None
        if not listing.owned:
            raise GuardError(
                f"there is a table {name} that wg-agent did not make",
                f"rename it, or remove it by: nft delete table {name}",
            )
        return listing

    def _open(self) -> Nft:
        if self._nft is None:
            self._nft = open_nft()
        return self._nft
