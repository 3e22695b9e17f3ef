"""The vision tower: Hugging Face's own module, whole on every rank of the first pipeline stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.parallel.device import device

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel


def build_vision(config: Qwen2_5_VLConfig, dtype: torch.dtype) -> Qwen2_5_VisionTransformerPretrainedModel:
    """The tower with its merger; weights are to be loaded.

    Called with patches [N, D] and a grid [I, 3], its ``pooler_output`` is [N / merge^2, hidden of the language model].
    """
    declare_torchvision_ops()
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config.vision_config._attn_implementation = "sdpa"
    tower = Qwen2_5_VisionTransformerPretrainedModel(config.vision_config)
    for parameter in tower.parameters():
        # Parameters only: the rotary frequencies are a buffer and stay float32, as they do in Hugging Face's loader.
        parameter.data = parameter.data.to(dtype)
        # Every tensor-parallel rank computes the same gradient, up to the order of a device's atomic additions:
        # Megatron averages them, so that the copies never drift apart.
        parameter.average_gradients_across_tp_domain = True
    return tower.to(device())
