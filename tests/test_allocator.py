import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from agent.allocator import return_freed_memory

def megabytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

if sys.argv[1] == "told" and not return_freed_memory():
    sys.exit(77)
# A large block that is freed has glibc keep as much from then on.
bytes(24_000_000)
before = megabytes()
several = [bytes(4000) for _ in range(5000)]
del several
print(megabytes() - before)
"""


def kept(how: str) -> float:
    """Megabytes that a process has still after it has freed 20, ``told`` to return them or not."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=False)
    if ran.returncode == 77:
        pytest.skip("this C library is not told what to return")
    assert ran.returncode == 0, ran.stderr
    return float(ran.stdout)


def test_what_is_freed_goes_back_to_the_system() -> None:
    assert kept("told") < 2
    assert kept("not told") > 15


def test_modules_are_not_searched_for_garbage_again_and_again() -> None:
    program = """
import gc
from agent.allocator import collect_rarely
collect_rarely()
assert gc.isenabled()
print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000, gc.get_threshold()[0] > 10_000)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "True True True\n"
