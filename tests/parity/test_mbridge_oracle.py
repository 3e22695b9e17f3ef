"""mbridge is asked whether it agrees: same names, same order in QKV and gate-up, same shards.

Needs the extra ``oracle``. Only mbridge's functions on names and tensors are used; its model is never built.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.models.qwen2_5_vl.config import TextSizes
from megatron_mmrl.models.qwen2_5_vl.weights import weight_table
from megatron_mmrl.parallel.sharding import WeightEntry

declare_torchvision_ops()  # mbridge imports transformers' image processors
pytest.importorskip("mbridge", reason="install the extra: pip install --no-deps mbridge==0.15.1")

# Qwen2.5-VL-7B with narrower heads: 28 query heads in 4 groups, and an intermediate size that 4 ranks divide.
HEADS, GROUPS, HEAD_DIM, INTERMEDIATE, VOCAB, LAYERS, VISION_DEPTH = 28, 4, 2, 148, 152, 2, 2
HIDDEN = HEADS * HEAD_DIM
SIZES = TextSizes(heads=HEADS, groups=GROUPS, head_dim=HEAD_DIM, vocab_size=VOCAB, tied=False)
SHAPES = {
    "q_proj.weight": (HIDDEN, HIDDEN),
    "k_proj.weight": (GROUPS * HEAD_DIM, HIDDEN),
    "v_proj.weight": (GROUPS * HEAD_DIM, HIDDEN),
    "q_proj.bias": (HIDDEN,),
    "k_proj.bias": (GROUPS * HEAD_DIM,),
    "v_proj.bias": (GROUPS * HEAD_DIM,),
    "o_proj.weight": (HIDDEN, HIDDEN),
    "gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "up_proj.weight": (INTERMEDIATE, HIDDEN),
    "down_proj.weight": (HIDDEN, INTERMEDIATE),
    "embed_tokens.weight": (VOCAB, HIDDEN),
    "lm_head.weight": (VOCAB, HIDDEN),
}
LAYER_NAMES = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
NAMES = (
    "language_model.embedding.word_embeddings.weight",
    *(f"language_model.decoder.layers.{layer}.{name}" for layer in range(LAYERS) for name in LAYER_NAMES),
    "language_model.decoder.final_layernorm.weight",
    "language_model.output_layer.weight",
)
TABLE = weight_table(NAMES, SIZES, first_layer=0)


def bridge(tensor_parallel_size: int):
    """mbridge's converter for this model, without the model."""
    from mbridge.models.qwen2_5_vl import Qwen2_5VLBridge

    made = object.__new__(Qwen2_5VLBridge)
    made.hf_config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=GROUPS, hidden_size=HIDDEN)
    made.config = SimpleNamespace(gated_linear_unit=True)
    made.mpu = SimpleNamespace(tp_size=tensor_parallel_size)
    made.make_vocab_size_divisible_by = None
    return made


def numbered(entry: WeightEntry) -> list[torch.Tensor]:
    """Tensors whose numbers are all different, so that any other order shows."""
    tensors, start = [], 0
    for name in entry.hf_names:
        shape = next((shape for end, shape in SHAPES.items() if name.endswith(end)), (HIDDEN,))
        tensors.append(torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64).view(shape))
        start += tensors[-1].numel()
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_names_agree(name: str) -> None:
    assert bridge(1)._weight_name_mapping_mcore_to_hf(name) == list(TABLE[name].hf_names)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_shards_agree_and_come_back(name: str, size: int) -> None:
    entry, oracle = TABLE[name], bridge(size)
    full = numbered(entry)
    ours = [entry.rule.split(full, rank, size) for rank in range(size)]
    whole = oracle._weight_to_mcore_format(name, full)
    theirs = oracle._weight_split_across_tp(name, whole, ours[0], size)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    parameter = SimpleNamespace(
        tensor_model_parallel=True, partition_dim=1 if ours[0].shape[0] == whole.shape[0] else 0
    )
    merged = whole if ours[0].shape == whole.shape else oracle._weight_merge_across_tp(name, ours, parameter)
    names, tensors = oracle._weight_to_hf_format(name, merged)
    assert names == list(entry.hf_names)
    assert all(torch.equal(a, b) for a, b in zip(tensors, entry.rule.merge(ours), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, full, strict=True))


def test_the_oracle_would_see_another_order() -> None:
    name = "language_model.decoder.layers.0.self_attention.linear_qkv.weight"
    q, k, v = numbered(TABLE[name])
    assert not bridge(1)._weight_to_mcore_format(name, [q, k, v]).equal(TABLE[name].rule.split([q, v, k], 0, 1))


def test_both_name_the_same_vision_tensors(tmp_path) -> None:
    """mbridge builds its own tower, with other names inside; the checkpoint's side is the same."""
    from megatron_mmrl.models.tiny import TinySizes, make_tiny_checkpoint

    make_tiny_checkpoint(tmp_path, sizes=TinySizes(num_layers=1, vision_depth=VISION_DEPTH))
    from megatron_mmrl.models.registry import stored_model

    oracle = bridge(1)
    per_layer = oracle._ATTENTION_MAPPING | oracle._MLP_MAPPING
    theirs = {hf for name, hf in oracle._DIRECT_MAPPING.items() if name.startswith("vision_model.")}
    for layer in range(VISION_DEPTH):
        names = (hf for name, hfs in per_layer.items() if name.startswith("vision_model.") for hf in hfs)
        theirs |= {name.format(layer_number=layer) for name in names}
    assert theirs == {name for name in stored_model(tmp_path).shapes if name.startswith("visual.")}
