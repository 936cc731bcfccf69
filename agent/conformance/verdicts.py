"""What was found of each clause: the ledger that all judges write to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Final, NamedTuple

from agent.conformance.clauses import CLAUSES, SECTIONS

_SHOWN: Final = 300
"""Characters of a finding: parts of it come from core."""


class Mark(StrEnum):
    """How a clause was found; ``SKIP`` is neither."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    SKIP = "skip"


class Verdict(NamedTuple):
    """The mark of a clause and what was seen."""

    mark: Mark
    seen: str


class Ledger:
    """Verdicts by clause: the first failure, else the first pass, else why it was skipped.

    ``secrets`` never come into a finding, also if core writes them where nobody expects them.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = [secret for secret in secrets if secret]
        self._found: dict[str, Verdict] = {}
        self._passes: Counter[str] = Counter()

    def __bool__(self) -> bool:
        """Whether anything was entered."""
        return bool(self._found)

    def passed(self, clause: str, seen: str) -> None:
        """The clause was kept this time."""
        self._passes[clause] += 1
        if self.mark(clause) in {None, Mark.SKIP}:
            self._found[clause] = self._verdict(clause, Mark.PASS, seen)

    def failed(self, clause: str, seen: str) -> None:
        """The clause was broken."""
        if self.mark(clause) is not Mark.FAIL:
            self._found[clause] = self._verdict(clause, Mark.FAIL, seen)

    def skipped(self, clause: str, why: str) -> None:
        """The clause could not be judged."""
        if clause not in self._found:
            self._found[clause] = self._verdict(clause, Mark.SKIP, why)

    def judged(self, clause: str, good: bool, seen: str) -> bool:
        """Enter a pass or a failure; return which."""
        (self.passed if good else self.failed)(clause, seen)
        return good

    def mark(self, clause: str) -> Mark | None:
        """What has been found of a clause so far."""
        found = self._found.get(clause)
        return None if found is None else found.mark

    def failures(self, *clauses: str) -> bool:
        """Whether one of these clauses was broken (of all, if none is named)."""
        return any(self.mark(clause) is Mark.FAIL for clause in clauses or CLAUSES)

    def verdict(self, clause: str) -> Verdict:
        """The verdict of a clause; what nobody has looked at was not seen."""
        found = self._found.get(clause, Verdict(Mark.SKIP, "not seen"))
        if found.mark is Mark.PASS and self._passes[clause] > 1:
            return found._replace(seen=f"{found.seen} (the first of {self._passes[clause]} times)")
        return found

    def counts(self) -> dict[Mark, int]:
        """How many clauses have each mark."""
        marks = [self.verdict(clause).mark for clause in CLAUSES]
        return {mark: marks.count(mark) for mark in Mark}

    def document(self) -> list[dict[str, Any]]:
        """All clauses for ``--json``, in their order."""
        return [
            {
                "section": section.title,
                "id": clause.id,
                "mark": self.verdict(clause.id).mark.value,
                "clause": clause.text,
                "seen": self.verdict(clause.id).seen,
                "remedy": clause.remedy if self.mark(clause.id) is Mark.FAIL else "",
            }
            for section in SECTIONS
            for clause in section.clauses
        ]

    def _verdict(self, clause: str, mark: Mark, seen: str) -> Verdict:
        if clause not in CLAUSES:
            raise KeyError(clause)
        for secret in self._secrets:
            seen = seen.replace(secret, "***")
        return Verdict(mark, seen[:_SHOWN])
