"""A run that stops and resumes goes on bit for bit: real Megatron layers, DDP and optimizers on gloo ranks."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.dist.launch import run_ranks
from safetensors import safe_open

from megatron_mmrl.checkpoint.manager import CheckpointManager
from megatron_mmrl.checkpoint.manifest import CheckpointError, Manifest
from megatron_mmrl.checkpoint.tensors import open_tensors, write_tensors
from megatron_mmrl.config.optim import OptimConfig
from megatron_mmrl.config.parallel import ParallelConfig

HIDDEN = 8
LAYOUTS = {
    "tensor 2": {"tensor_model_parallel_size": 2},
    "data 2": {"data_parallel_size": 2},
    "data 2, overlapped": {"data_parallel_size": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "data 2, plain optimizer": {"data_parallel_size": 2, "use_distributed_optimizer": False},
}


class Trainer:
    """A two-layer tensor-parallel network with Megatron's DDP and optimizer."""

    def __init__(self, parallel: ParallelConfig, dtype: torch.dtype) -> None:
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer import MegatronModule, TransformerConfig

        from megatron_mmrl.trainer.optim import build_optimizer, wrap_data_parallel

        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            use_cpu_initialization=True,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            gradient_accumulation_fusion=False,
        )
        init = torch.nn.init.normal_

        class Net(MegatronModule):
            def __init__(self) -> None:
                super().__init__(config)
                common = {"config": config, "init_method": init, "bias": True, "skip_bias_add": False}
                self.up = ColumnParallelLinear(HIDDEN, 2 * HIDDEN, gather_output=False, **common)
                self.down = RowParallelLinear(2 * HIDDEN, HIDDEN, input_is_parallel=True, **common)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.down(torch.tanh(self.up(x)[0]))[0]

        self.dtype = dtype
        self.chunks = wrap_data_parallel([Net()], parallel)
        self.optimizer = build_optimizer(self.chunks, OptimConfig(lr=1e-2), parallel, dtype)

    def step(self) -> float:
        """One update on data drawn from the global generator."""
        from megatron.core.distributed import finalize_model_grads

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self.chunks[0](torch.randn(4, HIDDEN, dtype=self.dtype)).float().square().sum()
        loss.backward()
        finalize_model_grads(self.chunks)
        self.optimizer.step()
        return loss.item() + random.random() + np.random.rand()


def resume(layout: dict, dtype: torch.dtype, root: Path) -> tuple[list[float], list[float], list[str], dict]:
    """Losses of updates 3 to 5 of an unbroken trainer, and of one that was stopped after update 2."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_mmrl.checkpoint.state import load_training_state, load_weights, save_training_state
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize, shutdown

    parallel = ParallelConfig(**layout)
    initialize(parallel, seed=0)
    manager = CheckpointManager(root, keep=1, collectives=Collectives())
    trainer = Trainer(parallel, dtype)
    trainer.step(), trainer.step()
    extra = {"step": 2, "position": [1, 5]}
    manager.save(2, lambda path: save_training_state(path, trainer.chunks, trainer.optimizer, extra))
    saved = copy_of_weights(trainer)
    unbroken = [trainer.step() for _ in range(3)]

    torch.manual_seed(1234 + int(os.environ["RANK"]))
    random.seed(5), np.random.seed(6)
    get_cuda_rng_tracker().reset()
    stopped = Trainer(parallel, dtype)
    load_weights(manager.latest(), stopped.chunks)
    loaded = copy_of_weights(stopped)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    found = manager.load(manager.latest(), lambda path: load_training_state(path, stopped.chunks, stopped.optimizer))
    resumed = [stopped.step() for _ in range(3)]
    different = different_tensors(trainer, stopped)
    shutdown()
    return unbroken, resumed, different, found


def copy_of_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.chunks[0].module.named_parameters()}


def different_tensors(one: Trainer, other: Trainer) -> list[str]:
    """Weights, float32 copies and moments that are not bit-equal."""
    from megatron_mmrl.checkpoint.state import _model_tensors, _optimizer_tensors

    pairs = [
        (dict(_model_tensors(trainer.chunks)), dict(_optimizer_tensors(trainer.chunks, trainer.optimizer)))
        for trainer in (one, other)
    ]
    different = []
    for mine, theirs in zip(*pairs, strict=True):
        assert mine.keys() == theirs.keys()
        different += [name for name in mine if not torch.equal(mine[name], theirs[name])]
    return different


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in LAYOUTS), ("tensor 2", torch.bfloat16), ("data 2", torch.bfloat16)],
)
def test_stopped_and_resumed_equals_unbroken(tmp_path: Path, name: str, dtype: torch.dtype):
    for unbroken, resumed, different, extra in run_ranks(resume, 2, LAYOUTS[name], dtype, tmp_path):
        assert resumed == unbroken
        assert len(set(unbroken)) == 3  # it does move
        assert different == []
        assert extra == {"step": 2, "position": [1, 5]}
    manifest = Manifest.read(tmp_path / "step_2")
    assert (manifest.step, manifest.world_size) == (2, 2)
    weights = [file for file in manifest.files if file.startswith("model_")]
    assert len(weights) == (2 if name == "tensor 2" else 1)  # replicas hold the same: one writes
    if "plain" not in name:
        with safe_open(tmp_path / "step_2" / "optimizer_00001.safetensors", framework="pt") as file:
            keys = {key.rpartition("/")[2] for key in file.keys()}  # noqa: SIM118  # not a mapping
        assert keys == {"main", "exp_avg", "exp_avg_sq", "step"}


def refuse(root: Path) -> list[str]:
    """Messages for another layout, another model and a restart of the optimizer."""
    from megatron_mmrl.checkpoint.state import load_training_state, load_weights, save_training_state
    from megatron_mmrl.parallel.state import initialize, shutdown

    parallel = ParallelConfig()
    initialize(parallel, seed=0)
    trainer = Trainer(parallel, torch.float32)
    root.mkdir()
    save_training_state(root, trainer.chunks, trainer.optimizer, {})
    messages = []

    def attempt(call) -> None:
        with pytest.raises(CheckpointError) as error:
            call()
        messages.append(str(error.value))

    trainer.step()
    load_training_state(root, trainer.chunks, trainer.optimizer)  # never updated when it was saved
    assert all(not part.state for part in [trainer.optimizer.chained_optimizers[0].optimizer])
    other = Trainer(parallel, torch.bfloat16)
    attempt(lambda: load_weights(root, other.chunks))
    state = json.loads((root / "state.json").read_text())
    state["layout"]["tensor"] = 2
    (root / "state.json").write_text(json.dumps(state))
    attempt(lambda: load_weights(root, trainer.chunks))
    shutdown()
    return messages


def test_what_does_not_belong_is_refused_with_both_sides(tmp_path: Path):
    ((dtype, layout),) = run_ranks(refuse, 1, tmp_path / "c")
    assert "torch.float32 (16, 8), the model's is torch.bfloat16 (16, 8)" in dtype
    assert "'tensor': 2" in layout
    assert "'tensor': 1" in layout


def test_tensor_files_are_safetensors(tmp_path: Path):
    whole = torch.arange(24, dtype=torch.float32)
    given = {
        "view": whole[3:9].view(2, 3),
        "strided": whole.view(4, 6).t(),
        "bf16": whole.bfloat16(),
        "scalar": torch.tensor(7.0),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "long": torch.tensor([2**40]),
    }
    write_tensors(tmp_path / "t", given)
    with safe_open(tmp_path / "t", framework="pt") as file:
        assert set(file.keys()) == set(given)
        for name, tensor in given.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


def test_unreadable_tensor_files_are_refused_by_name(tmp_path: Path):
    (tmp_path / "cut").write_bytes(b"\x10\x00")
    for file, message in ((tmp_path / "cut", "cut cannot be read"), (tmp_path / "none", "none cannot be read")):
        with pytest.raises(CheckpointError, match=message), open_tensors(file):
            pass
    write_tensors(tmp_path / "t", {"a": torch.zeros(2)})
    with open_tensors(tmp_path / "t") as file:
        with pytest.raises(CheckpointError, match="has no tensor b"):
            file.read("b")
        with pytest.raises(CheckpointError, match=r"\(2,\), the model's is torch.float32 \(3,\)"):
            file.read_into("a", torch.zeros(3))
