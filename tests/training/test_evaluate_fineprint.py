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
import math

import pytest

from training.evaluate_fineprint import EvaluateArguments, evaluate, get_standard_error, summarize


def test_summary_counts_by_kind_scene_and_number_of_texts():
    results = [
        {"kind": "fine", "scene": "street", "num_signs": 1, "right": True},
        {"kind": "fine", "scene": "street", "num_signs": 2, "right": False},
        {"kind": "fine", "scene": "table", "num_signs": 2, "right": True},
        {"kind": "coarse", "scene": "table", "num_signs": 2, "right": False},
    ]
    summary = {name: (group["accuracy"], group["num_questions"]) for name, group in summarize(results).items()}
    assert summary == {
        "coarse": (0.0, 1),
        "fine": (0.6667, 3),
        "fine, 1 texts": (1.0, 1),
        "fine, 2 texts": (0.5, 2),
        "fine, scene street": (0.5, 2),
        "fine, scene table": (1.0, 1),
    }


def test_standard_error():
    assert get_standard_error(50, 100) == pytest.approx(0.05)
    assert get_standard_error(9, 10) == pytest.approx(math.sqrt(0.09 / 10))


def test_missing_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="test.jsonl"):
        evaluate(EvaluateArguments(model="none", data=str(tmp_path)))
