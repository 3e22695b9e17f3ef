"""A run says which Adam and attention it uses, whatever the machine has."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megatron_mmrl.config import Config
from tests.dist.launch import run_ranks
from tests.dist.policy_case import build, config_of

TORCH = f"torch {torch.__version__}"
APEX = """
import torch

class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, adam_w_mode, **settings):
        super().__init__(params, **settings)
"""


def line(config: Config) -> str:
    from megatron_mmrl.parallel.state import shutdown
    from megatron_mmrl.trainer.kernels import kernels_in_use

    policy, _ = build(config)
    said = kernels_in_use(policy.chunks, policy.optimizer)
    shutdown()
    return said


def line_with_apex(config: Config, folder: Path) -> str:
    """As if Megatron had found the apex in ``folder`` when it was imported, which it was before this process began."""
    import megatron.core.optimizer as megatron

    sys.path.insert(0, str(folder))
    from apex.optimizers import FusedAdam

    megatron.Adam, megatron.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    return line(config)


def test_a_machine_without_fused_kernels_uses_torch(model_path: Path) -> None:
    first, last = run_ranks(line, 2, config_of(model_path, "parallel.pipeline_model_parallel_size=2"))
    adam, attention, vision = first.split("; ")
    assert adam == f"Adam: AdamW of {TORCH}"
    assert attention == f"attention: scaled_dot_product_attention of {TORCH}"
    assert vision.startswith("vision attention: sdpa of transformers 5.")
    assert last == f"{adam}; {attention}; vision attention: none on this rank"


def test_an_adam_from_elsewhere_is_named(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "optimizers.py").write_text(APEX)
    (said,) = run_ranks(line_with_apex, 1, config_of(model_path), tmp_path)
    assert said.startswith("Adam: FusedAdam of apex; attention: ")
