"""The same as ``mmrl convert hf-to-megatron``, as a script."""

from __future__ import annotations

import sys

from megatron_mmrl.commands.convert import tool

if __name__ == "__main__":
    sys.exit(tool("hf-to-megatron", __doc__))
