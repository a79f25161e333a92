# Copyright 2026 The LLaVA-HR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
