# SPDX-License-Identifier: Apache-2.0
"""vLLM's own parser accepts the documented commands: `make test-vllm`."""

import pytest
from snippets import expand, get_blocks


pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm` has an environment of its own")

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md"])
def test_documented_commands_are_accepted(document, tmp_path):
    blocks = [block for language, block in get_blocks(document) if language == "bash" and "vllm serve" in block]
    commands = [words[:-1] for block in blocks for words in expand(block, tmp_path) if words[0] == "vllm"]
    assert commands
    for _, serve, *arguments in commands:
        assert serve == "serve"
        parser = make_arg_parser(FlexibleArgumentParser())
        parser.parse_args(arguments)  # ends the process for an unknown option or value
