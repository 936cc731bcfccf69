import math

import pytest

from agent.sandbox.liveness import Witness, known_silence, sent_policy


@pytest.mark.parametrize(
    ("witnesses", "seconds"),
    [
        ([], 900),
        ([Witness(50, 60, settled=990)], 890),
        ([Witness(50, 60, settled=990), Witness(50, 60, settled=400)], 300),
        ([Witness(50, 60)], -math.inf),
        ([Witness(50, 60, settled=90)], -10),
        ([Witness(150, 170, settled=149)], 49),
        ([Witness(150, 170, settled=990)], 890),
        ([Witness(50, None)], 900),
        ([Witness(100, None, settled=90)], -10),
        ([Witness(150, None, settled=149)], 49),
        ([Witness(150, None), Witness(50, 60, settled=990)], -math.inf),
    ],
    ids=[
        "nobody could hear it",
        "there, and telling",
        "one of two has not told since",
        "there, and has never told",
        "there, and has not told since the sign",
        "back, and has not told yet",
        "back, and has told of its absence",
        "left before the sign: used elsewhere",
        "left with the sign",
        "left after the sign",
        "one of two is still away, and never told",
    ],
)
def test_where_core_judges_silence_is_known_as_far_as_all_have_told(
    witnesses: list[Witness], seconds: float
) -> None:
    assert known_silence(100, witnesses, 1000, reports=True) == seconds


@pytest.mark.parametrize(
    ("witnesses", "seconds"),
    [
        ([Witness(50, 60)], 900),
        ([Witness(50, None)], 900),
        ([Witness(150, 170)], 830),
        ([Witness(150, 170, settled=160)], 830),
        ([Witness(150, 170, settled=180)], 900),
        ([Witness(150, None, settled=149)], -math.inf),
    ],
    ids=[
        "was there all the time",
        "left before the sign: used elsewhere",
        "back: could not tell before",
        "back, and has told before that",
        "back, and has told of its absence",
        "away",
    ],
)
def test_where_a_gateway_judges_silence_counts_while_it_could_tell(
    witnesses: list[Witness], seconds: float
) -> None:
    assert known_silence(100, witnesses, 1000, reports=False) == seconds


def test_only_a_shared_location_is_told_that_core_judges_whatever_its_policy() -> None:
    policy = {"idle_timeout": 300, "liveness": "gateway"}
    assert sent_policy(policy, shared=True) == {"idle_timeout": 300, "liveness": "core"}
    assert sent_policy(policy, shared=False) == policy
