from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("WG_AGENT_") or name.endswith("_DIRECTORY"):
            monkeypatch.delenv(name)
