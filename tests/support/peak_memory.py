# SPDX-License-Identifier: Apache-2.0
"""How much memory a few lines of a test need at most, whatever the process has had before."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


PROCESS = Path("/proc/self")


@contextlib.contextmanager
def peak_growth_below(megabytes: int) -> Iterator[None]:
    """
    Fails if the peak of this process's resident memory within the block lies higher above the beginning. Only Linux
    tells; elsewhere nothing is checked.
    """
    if sys.platform != "linux":
        yield
        return
    (PROCESS / "clear_refs").write_text("5")  # the peak so far is what there is now
    before = _read_peak()
    yield
    growth = (_read_peak() - before) / 1024
    assert growth < megabytes, f"the peak of memory rose by {growth:.0f} MB"


def _read_peak() -> int:
    """In kilobytes."""
    return int((PROCESS / "status").read_text().split("VmHWM:")[1].split()[0])
