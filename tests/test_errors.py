from __future__ import annotations

import errno
import os

import pytest

from agent.errors import AgentError, ConfigError, cannot_start


@pytest.mark.parametrize("code", [errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENOSPC, errno.EMFILE])
def test_what_may_pass_by_itself_is_no_fault_of_the_configuration(code: int) -> None:
    error = cannot_start(OSError(code, os.strerror(code)), "what", "do")

    assert type(error) is AgentError
    assert (error.message, error.hint) == ("what", "do")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EROFS])
def test_what_a_person_has_to_correct_is_one(code: int) -> None:
    assert type(cannot_start(OSError(code, os.strerror(code)), "what")) is ConfigError
