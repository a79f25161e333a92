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
"""Makes transformers' own test suites importable as `transformers_tests`."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest


# This folder: `fetch_hub_objects_for_ci`, which the suites import
sys.path.append(str(Path(__file__).parent))

from fetch_transformers_tests import release_root  # noqa: E402


RELEASE = release_root(version("transformers"))

if not RELEASE.exists():
    raise pytest.UsageError(
        f"{RELEASE} is missing, which holds the test suites of the installed transformers. Run `make suites`, or "
        "`python tests/common/fetch_transformers_tests.py` in the environment that runs the tests."
    )
sys.path.append(str(RELEASE))
