# SPDX-License-Identifier: Apache-2.0
"""What mkdocs.yml needs to build docs/ as a site: links out of docs/, and docstrings in transformers' form."""

import inspect
import re
from typing import Any

import griffe


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Folders, and files outside of docs/, are not part of the site: their links become the path in the checkout."""

    def name(match: re.Match) -> str:
        text, target = match.groups()
        return f"{text} (`{target.removeprefix('../')}`)" if text.strip("`") not in target else f"`{target[3:]}`"

    markdown = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)", name, markdown)
    return re.sub(r"\[[^\]]+\]\(([\w/-]+)\)", r"`docs/\1`", markdown)


class PlainReferences(griffe.Extension):
    """
    transformers' docstrings in griffe's form: [`Class`] is `Class`, types have no markup, and a list of names that a
    backslash continues is one line.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            value = inspect.cleandoc(obj.docstring.value.replace("\\\n", ""))
            value = re.sub(r"\[`~?([\w.]+)`\](?!\()", r"`\1`", value)
            value = re.sub(r"^    `([^`]+)`:", r"    \1:", value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(
                r"^    [\w, ]+ \(.*\):", lambda match: re.sub("[`*]", "", match[0]), value, flags=re.MULTILINE
            )
