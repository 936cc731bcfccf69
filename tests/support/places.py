"""Where a test of a whole site runs: on wireguard-go right here, and on the kernel's WireGuard."""

import pytest

_HERE = pytest.param("wireguard-go", marks=(pytest.mark.netns, pytest.mark.userspace))
_KERNEL = pytest.param("kernel", marks=(pytest.mark.kernel, pytest.mark.full_size, pytest.mark.timeout(600)))

here_and_at_full_size_on_the_kernel = pytest.mark.parametrize("where", [_HERE, _KERNEL])
"""The test runs here always, and on the kernel as well in ``make reliability``; its argument is ``where``."""
