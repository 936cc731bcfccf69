"""Core's access rules in force, and masquerading: one nftables table of ours, beside the guard's.

What was put in force is kept in a file, so that after a reboot it stands before the first peer does,
whether core can be reached or not. There is a file as long as there is a table.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Final, Literal, NoReturn

import msgspec
import structlog

from agent import clock, nftlist, patience
from agent.acl import Acl, Verdict
from agent.aclruleset import AclTable, access_table, acl_table_name, remove
from agent.errors import GuardError
from agent.model import Prefix
from agent.nft import Nft
from agent.nftlist import Listing
from agent.nftwatch import Watch
from agent.owntable import OwnTable

_LOOK: Final = 600.0
"""Seconds after which the table is looked at though nothing was heard of it."""
_LOOK_DEAF: Final = 10.0
"""So where changes are not heard of."""
_RETRY: Final = 5.0
"""Seconds between two attempts to have in force what could not be put in force."""
_PAUSE: Final = 0.5
"""Seconds at least between two looks, however often the table is changed."""
_SHOWN: Final = 3
"""Differences that one line of the log names."""
_SHUT: Final = Acl(Verdict.DROP)

_log = structlog.get_logger(__name__)


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """The file's content."""

    acl: Acl | None
    networks: tuple[Prefix, ...] = ()
    """Those that are masqueraded."""
    version: Literal[1] = 1


class AclFirewall:
    """The ``AccessRules`` of ``agent.ports``, over nftables; every method raises GuardError.

    ``networks`` gives the VPN's own prefixes as they are at each call, None while they are not known: those
    before then stay. With ``enabled`` off core's rules are ignored, and ``masquerade`` alone counts. ``nft``
    is for tests.
    """

    def __init__(
        self,
        interface: str,
        networks: Callable[[], Collection[Prefix] | None],
        state_file: Path,
        *,
        enabled: bool = True,
        masquerade: bool = False,
        priority: int = 0,
        nft: Nft | None = None,
    ) -> None:
        self.stands = False
        """Whether what is to be in force has been, since the agent started."""
        self._interface = interface
        self._networks = networks
        self._file = state_file
        self._enabled = enabled
        self._masquerade = masquerade
        self._priority = priority
        self._own = OwnTable(partial(acl_table_name, interface), nft)
        self._acl: Acl | None = None
        """What is to be in force."""
        self._due = False
        """Whether it could not be put in force when the agent started."""
        self._table: AclTable | None = None
        """What was put in force last, None for no table."""
        self._kept: bytes | None = None
        """The file's content, as far as it is of use; None if there is no file."""
        self._unkept = False
        """Whether the file could not be written, which was said."""
        self._masqueraded: frozenset[Prefix] = frozenset()
        self._ignoring = False
        self._awake = asyncio.Event()
        self._watch: Watch | None = None
        self._deaf = False

    async def start(self) -> None:
        """Put in force what was when the agent or the host went down; nothing if that is nothing.

        A file that can't be read closes the way for all peers until core says what passes. After a
        failure ``keep`` goes on trying.
        """
        await self._own.do(partial(self._start, self._now_masqueraded()))
        self.stands = True
        self._awake.set()

    async def put(self, acl: Acl | None) -> None:
        """Have these in force, or none (None), and remember them; on failure what was in force stays.

        If they can only not be remembered, that is logged, and tried again: it must not keep core from
        being heard.
        """
        if acl is not None and not self._enabled:
            if not self._ignoring:
                _log.warning("core's access rules are ignored", why="firewall.acl is off")
            self._ignoring, acl = True, None
        began = clock.monotonic()
        try:
            await self._own.do(partial(self._put, acl, self._now_masqueraded()))
        finally:
            patience.note("access rules", clock.monotonic() - began)
        self.stands = True
        self._awake.set()

    def refresh(self) -> None:
        """Have ``keep`` masquerade other networks if they have changed; costs next to nothing if not."""
        if self._masquerade and self._now_masqueraded() != self._masqueraded:
            self._awake.set()

    async def keep(self) -> NoReturn:
        """Put the table back whenever somebody else changes it; runs until cancelled, whatever fails."""
        failure = ""
        while True:
            if not failure:
                await self._disturbed(_LOOK_DEAF if self._deaf else _LOOK)
            try:
                drift = await self._own.do(partial(self._mend, self._now_masqueraded()))
            except GuardError as error:
                if failure != str(error):
                    _log.error("access rules can't be put in force", error=error.message, hint=error.hint)
                failure = str(error)
                await asyncio.sleep(_RETRY)
                continue
            self.stands = True
            if failure:
                _log.info("access rules are in force again")
                failure = ""
            if drift:
                _log.warning(
                    "somebody has changed the table of access rules: it is put back",
                    changes=drift[:_SHOWN],
                    more=max(0, len(drift) - _SHOWN),
                )
            await asyncio.sleep(_PAUSE)

    async def remove(self) -> bool:
        """Remove the table; return whether it was there. The file stays."""
        return await self._own.do(self._remove)

    def close(self) -> None:
        """Let go of nftables; the table stays."""
        self._own.close()
        self._hear_nothing()

    def _now_masqueraded(self) -> frozenset[Prefix]:
        if not self._masquerade:
            return frozenset()
        networks = self._networks()
        return self._masqueraded if networks is None else frozenset(networks)

    async def _disturbed(self, at_most: float) -> None:
        """Return once the table may be otherwise than it should be, or after so many seconds.

        While there is no table, nor should be, nothing is listened to.
        """
        if self._table is None and not self._due:
            self._hear_nothing()
            await self._awake.wait()
        elif not self._deaf:
            try:
                await self._told(at_most)
            except GuardError as error:
                _log.warning("changes of the access rules are found at looks only", error=str(error))
                self._hear_nothing()
                self._deaf = True
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._awake.wait(), at_most)
        self._awake.clear()

    async def _told(self, at_most: float) -> None:
        if self._watch is None:
            # What has changed before there was a watch is to be seen now.
            self._watch = Watch(acl_table_name(self._interface), lambda: None)
            return
        word = [asyncio.ensure_future(self._watch.changed()), asyncio.ensure_future(self._awake.wait())]
        try:
            done, _ = await asyncio.wait(word, timeout=at_most, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in word:
                task.cancel()

    def _hear_nothing(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    # In the worker thread.

    def _start(self, networks: frozenset[Prefix]) -> None:
        kept = self._recall()
        if self._enabled:
            self._acl = kept.acl
        if kept.networks and self._masquerade:
            # Core's, perhaps, which are in the journal, and that has not been read yet.
            networks = frozenset(kept.networks)
        if self._acl is None and not self._masquerade and self._kept is None:
            # There was never anything to put in force: nftables is not even opened.
            return
        self._due, self._masqueraded = True, networks
        self._enforce(self._acl, networks)
        if self._acl is not _SHUT:
            self._note_down()

    def _put(self, acl: Acl | None, networks: frozenset[Prefix]) -> None:
        self._enforce(acl, networks)
        self._acl = acl
        self._note_down()

    def _enforce(self, acl: Acl | None, networks: frozenset[Prefix]) -> None:
        try:
            table = access_table(self._interface, acl, networks, self._priority)
        except ValueError as error:
            raise GuardError(
                f"access rules can't be put in nftables' words: {error}",
                "correct the location's access rules in core",
            ) from None
        self._have(table, self._own.listing())
        self._masqueraded, self._due = networks, False

    def _mend(self, networks: frozenset[Prefix]) -> list[str]:
        """Have in force what is to be; return how somebody else has changed what was."""
        wanted = access_table(self._interface, self._acl, networks, self._priority)
        before = self._table
        if wanted is None and before is None and not self._due:
            return []
        held = self._own.listing()
        drift: list[str] = []
        if before is not None:
            drift = ["it is gone"] if held is None else nftlist.acl_faults(held, before)
        self._have(wanted, held)
        if self._unkept or networks != self._masqueraded:
            self._masqueraded = networks
            self._note_down()
        self._due = False
        return drift

    def _have(self, table: AclTable | None, held: Listing | None) -> None:
        if table is None:
            if held is not None:
                self._own.run(remove(self._interface))
        elif held is None or nftlist.acl_faults(held, table):
            for transaction in nftlist.acl_change(held or Listing(), table):
                self._own.run(transaction)
        self._table = table

    def _remove(self) -> bool:
        there = self._own.listing() is not None
        if there:
            self._own.run(remove(self._interface))
        self._table = None
        return there

    def _recall(self) -> _Kept:
        """Return what the file holds, nothing if there is none; one that is damaged closes the way."""
        try:
            self._kept = self._file.read_bytes()
            kept = msgspec.json.decode(self._kept, type=_Kept)
            access_table(self._interface, kept.acl, kept.networks)
        except FileNotFoundError:
            return _Kept(None)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._kept = b""
            if self._enabled:
                _log.error(
                    "kept access rules can't be read: nothing passes until core says what does",
                    file=str(self._file),
                    error=str(error),
                )
            return _Kept(_SHUT)
        return kept

    def _note_down(self) -> None:
        """Have the file say what is in force; a failure is told once, and the next call tries again."""
        try:
            if self._acl is None and not self._masquerade:
                self._file.unlink(missing_ok=True)
                self._kept = None
            else:
                self._write(msgspec.json.encode(_Kept(self._acl, tuple(sorted(self._masqueraded)))))
        except OSError as error:
            if not self._unkept:
                _log.error(
                    "access rules are in force, but not kept: a reboot brings others until core is there",
                    file=str(self._file),
                    error=error.strerror,
                )
            self._unkept = True
        else:
            self._unkept = False

    def _write(self, content: bytes) -> None:
        if content == self._kept:
            return
        fresh = self._file.with_name(f"{self._file.name}.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._file)
        _sync(self._file.parent)
        self._kept = content


def _sync(folder: Path) -> None:
    """Have the names in it on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
