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
"""
The module of transformers' repository that maps the address of a Hub file to a copy of it, which transformers' test
suites import and the source release lacks. Here every picture is one of this project's own.
"""

from pathlib import Path


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
PICTURE = FIXTURES / "reference" / "stage2-1024" / "images" / "case0_0.png"


def url_to_local_path(url: str) -> str:
    return str(PICTURE) if url.endswith((".png", ".jpg")) else url
