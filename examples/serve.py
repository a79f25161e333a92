# SPDX-License-Identifier: Apache-2.0
"""
The OpenAI-compatible server of transformers with LLaVA-HR.

    python -m examples.serve MODEL [options of `transformers serve`, such as --host, --port, --device, --dtype]

What it does is in the package, so that `python -m modeling_llava_hr.serving` does the same without a checkout.
"""

from modeling_llava_hr.serving import main


if __name__ == "__main__":
    main()
