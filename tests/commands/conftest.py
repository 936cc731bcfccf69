from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("WG_AGENT_") or name.endswith("_DIRECTORY"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def core_limit_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command does to its process would here be done to that of all tests."""
    monkeypatch.setattr("agent.commands.check.forbid_core_dumps", lambda: None)
    monkeypatch.setattr("agent.commands.conformance.forbid_core_dumps", lambda: None)
    monkeypatch.setattr("agent.commands.run.forbid_core_dumps", lambda **_: None)
    monkeypatch.setattr("agent.commands.import_defguard.forbid_core_dumps", lambda: None)
