# SPDX-License-Identifier: Apache-2.0
"""What the tasks of this folder need beyond YAML. lmms-eval imports it by its path."""

from pathlib import Path

from datasets import Dataset, Image


IMAGES = Path(".cache", "fineprint", "images").absolute()


def select_fine(data: Dataset) -> Dataset:
    """The fine questions of FinePrint with their images."""
    return _select(data, "fine")


def select_coarse(data: Dataset) -> Dataset:
    """The coarse questions of FinePrint with their images."""
    return _select(data, "coarse")


def _select(data: Dataset, kind: str) -> Dataset:
    data = data.filter(lambda row: row["kind"] == kind).map(lambda row: {"image": str(IMAGES / row["image"])})
    return data.cast_column("image", Image())
