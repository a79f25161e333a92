# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a block of a test, whatever the process has used before."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


PROCESS = Path("/proc/self")


@contextlib.contextmanager
def peak_growth_below(megabytes: int) -> Iterator[None]:
    """
    Fails if this process's peak resident memory within the block grows by more. Checks nothing but on Linux.
    """
    if sys.platform != "linux":
        yield
        return
    (PROCESS / "clear_refs").write_text("5")  # resets the peak
    before = _read_peak()
    yield
    growth = (_read_peak() - before) / 1024
    assert growth < megabytes, f"the peak of memory rose by {growth:.0f} MB"


def _read_peak() -> int:
    """In kilobytes."""
    return int((PROCESS / "status").read_text().split("VmHWM:")[1].split()[0])
