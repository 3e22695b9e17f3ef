"""What ranks of tests need, imported once in the server process that they are forked from.

That saves six seconds per rank.
"""

import megatron.core.distributed
import megatron.core.models.gpt
import megatron.core.optimizer  # noqa: F401
import pytest  # noqa: F401

from megatron_mmrl.compat import declare_torchvision_ops

declare_torchvision_ops()

import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: E402, F401
