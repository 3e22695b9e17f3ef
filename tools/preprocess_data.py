"""The same as ``mmrl data prepare``, as a script."""

from __future__ import annotations

import sys

from megatron_mmrl.commands.data_prepare import tool

if __name__ == "__main__":
    sys.exit(tool(__doc__))
