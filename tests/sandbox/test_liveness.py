import math

import pytest

from agent.sandbox.liveness import Absence, sent_policy, silent_since


@pytest.mark.parametrize(
    ("absences", "since"),
    [
        ([], 100),
        ([Absence(50, 60)], 100),
        ([Absence(50, None)], 100),
        ([Absence(150, 170)], 170),
        ([Absence(150, 170), Absence(120, 190), Absence(20, 200)], 190),
        ([Absence(100, None)], math.inf),
        ([Absence(150, None), Absence(150, 170)], math.inf),
    ],
    ids=[
        "nobody was away",
        "back before the sign",
        "left before the sign: used elsewhere",
        "back after the sign: could not tell before",
        "the last of those that could not tell",
        "left with the sign",
        "one of two is still away",
    ],
)
def test_silence_counts_while_whoever_could_hear_could_tell(absences: list[Absence], since: float) -> None:
    assert silent_since(100, absences) == since


def test_only_a_shared_location_is_told_that_core_judges_whatever_its_policy() -> None:
    policy = {"idle_timeout": 300, "liveness": "gateway"}
    assert sent_policy(policy, shared=True) == {"idle_timeout": 300, "liveness": "core"}
    assert sent_policy(policy, shared=False) == policy
