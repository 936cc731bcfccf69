import pytest

from agent.lives import After, Lives, begin

HERE, BEFORE = "this boot", "another boot"


@pytest.mark.parametrize(
    ("stopped", "boot_id", "service_result", "after"),
    [
        (True, HERE, "", After.STOP),
        (True, BEFORE, "", After.STOP),
        (True, HERE, "watchdog", After.STOP),
        (False, HERE, "", After.CRASH),
        (False, HERE, "success", After.STOP),
        (False, HERE, "watchdog", After.WATCHDOG),
        (False, HERE, "oom-kill", After.OOM),
        (False, HERE, "exit-code", After.CRASH),
        (False, HERE, "signal", After.CRASH),
        (False, HERE, "something new", After.CRASH),
        (False, BEFORE, "", After.REBOOT),
        (False, BEFORE, "watchdog", After.REBOOT),
    ],
)
def test_a_start_is_judged_by_the_mark_then_the_boot_then_the_manager(
    stopped: bool, boot_id: str, service_result: str, after: After
) -> None:
    former = Lives(boot_id, stopped, {})

    assert begin(former, HERE, service_result)[0] is after


def test_without_a_former_life_it_is_the_first() -> None:
    assert begin(None, HERE, "watchdog") == (After.FIRST, Lives(HERE, stopped=False, starts={"first": 1}))


def test_starts_add_up_and_no_life_begins_stopped() -> None:
    former = Lives(HERE, stopped=True, starts={"first": 1, "stop": 6, "crash": 2})

    _, now = begin(former, HERE)

    assert now == Lives(HERE, stopped=False, starts={"first": 1, "stop": 7, "crash": 2})
    assert former.starts == {"first": 1, "stop": 6, "crash": 2}
