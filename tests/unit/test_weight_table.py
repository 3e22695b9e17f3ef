"""The weight table knows a layer by our names and by Transformer Engine's, and refuses what it does not know."""

from __future__ import annotations

import pytest

from megatron_mmrl.models.qwen2_5_vl.config import TextSizes
from megatron_mmrl.models.qwen2_5_vl.weights import weight_table

SIZES = TextSizes(heads=4, groups=2, head_dim=8, vocab_size=100, tied=False)
LAYER = "language_model.decoder.layers.1."
OURS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
TRANSFORMER_ENGINE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
COMMON = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


@pytest.mark.parametrize("norms", [OURS, TRANSFORMER_ENGINE], ids=["ours", "transformer engine"])
def test_both_name_forms_mean_the_same_tensors(norms: dict[str, str]) -> None:
    rows = norms | COMMON
    table = weight_table([LAYER + name for name in rows], SIZES, first_layer=6)
    assert {name: entry.hf_names for name, entry in table.items()} == {
        LAYER + name: (f"model.layers.7.{hf_name}",) for name, hf_name in rows.items()
    }
    plain = weight_table([LAYER + name for name in OURS], SIZES, first_layer=6)
    assert [table[LAYER + name].rule for name in norms] == [plain[LAYER + name].rule for name in OURS]


def test_an_unknown_parameter_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.router\.weight has no row"):
        weight_table([LAYER + "mlp.router.weight"], SIZES, first_layer=0)
