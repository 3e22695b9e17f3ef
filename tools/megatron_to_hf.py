"""The same as ``mmrl convert megatron-to-hf``, as a script."""

from __future__ import annotations

import sys

from megatron_mmrl.commands.convert import tool

if __name__ == "__main__":
    sys.exit(tool("megatron-to-hf", __doc__))
