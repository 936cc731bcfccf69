from __future__ import annotations

import re
import time

from agent import clock


def test_the_clocks_are_boot_time_and_wall_time() -> None:
    first = clock.read()
    second = clock.read()

    assert abs(first.wall - time.time()) < 5
    assert 0 <= second.boot - first.boot < 5
    assert first.boot >= clock.monotonic() - 5


def test_a_boot_has_a_name_that_stays() -> None:
    assert re.fullmatch(r"[0-9a-f-]{36}", clock.boot_id())
    assert clock.boot_id() == clock.boot_id()
