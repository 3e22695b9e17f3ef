"""CUDA graphs read the addresses they were captured with: they are captured again exactly when parameters move."""

from __future__ import annotations

import pytest
import torch

from megatron_mmrl.compat import declare_torchvision_ops


class Runner:
    """SGLang's side of a capture, as a record of calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def init_prefill_cuda_graph(self) -> None:
        self.calls.append("prefill")

    def init_decode_cuda_graph(self) -> None:
        self.calls.append("decode")


class Updater:
    def __init__(self) -> None:
        self.model, self.runner = torch.nn.Linear(4, 4), Runner()

    def get_model(self) -> torch.nn.Module:
        return self.model

    def get_model_runner(self) -> Runner:
        return self.runner


@pytest.mark.parametrize(("moves", "expected"), [(True, ["prefill", "decode"]), (False, [])])
def test_graphs_are_captured_again_when_parameters_move(moves: bool, expected: list[str]) -> None:
    declare_torchvision_ops()  # before SGLang, as in its own processes
    from megatron_mmrl.rollout.sglang_hooks import _update_and_capture

    def update(updater: Updater, load_format: str) -> tuple[bool, str]:
        new = torch.ones(4, 4)
        if moves:
            updater.model.weight.data = new
        else:
            updater.model.weight.data.copy_(new)
        return True, load_format

    updater = Updater()
    assert _update_and_capture(update, updater, "loader") == (True, "loader")
    assert torch.equal(updater.model.weight.data, torch.ones(4, 4))
    assert updater.runner.calls == expected
