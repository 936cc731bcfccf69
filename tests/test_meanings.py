from __future__ import annotations

from pathlib import Path

import pytest

import agent
from agent.meanings import ENDS, MEANINGS
from agent.model import EndReason, Refusal

AGENT = Path(agent.__file__).parent
SOURCES = [
    path.read_text()
    for path in AGENT.rglob("*.py")
    if path not in {AGENT / "model.py", AGENT / "meanings.py"} and not path.is_relative_to(AGENT / "sandbox")
]


def test_every_refusal_and_every_end_has_its_meaning() -> None:
    assert MEANINGS.keys() == set(Refusal)
    assert ENDS.keys() == set(EndReason)


@pytest.mark.parametrize("reason", [*Refusal, *EndReason])
def test_every_reason_is_given_by_something(reason: Refusal | EndReason) -> None:
    name = f"{type(reason).__name__}.{reason.name}"

    assert any(name in text for text in SOURCES)
