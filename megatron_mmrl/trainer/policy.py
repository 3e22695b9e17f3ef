"""The policy on megatron-core: log-probs, optimizer updates, weights. Every method is collective."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from numpy.typing import NDArray

from megatron_mmrl.algorithms.aggregate import count_tokens_in_sequence, sequence_numbers
from megatron_mmrl.algorithms.losses import LossFn, LossInputs, LossOutput
from megatron_mmrl.models.parts import freeze_parameters
from megatron_mmrl.models.registry import build_model, load_checkpoint, open_checkpoint
from megatron_mmrl.parallel.collectives import Collectives
from megatron_mmrl.parallel.device import device, dtype_of
from megatron_mmrl.reshard.memory import share_parameters
from megatron_mmrl.reshard.reference import export_hf
from megatron_mmrl.trainer.forward import TokenDistribution, TokenValues, run_schedule
from megatron_mmrl.trainer.memory import Parking, gradient_buffers, optimizer_tensors
from megatron_mmrl.trainer.optim import build_optimizer, set_learning_rate, wrap_data_parallel
from megatron_mmrl.trainer.schedule import lr_at
from megatron_mmrl.types import MicroBatch, TrainBatch, UpdateStats

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_mmrl.config import Config
    from megatron_mmrl.config.optim import OptimConfig
    from megatron_mmrl.models.hf_io import TensorReader


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; no rank has stepped."""


class MegatronPolicy:
    """pi_theta, its optimizer and, where asked for, the reference model pi_ref."""

    def __init__(self, config: Config, distribution: TokenDistribution, collectives: Collectives) -> None:
        self._config, self._distribution, self._collectives = config, distribution, collectives
        checkpoint = open_checkpoint(config.model.path)
        modules = self._build(checkpoint)
        freeze_parameters(modules, config.model.freeze, checkpoint.names)
        self.chunks = wrap_data_parallel(modules, config.parallel)
        # Before there is an optimizer: it takes views of the parameters.
        self.shared = share_parameters(self.chunks) if config.reshard.method == "in_place" else None
        if config.parallel.overlap_grad_reduce:
            syncs = [chunk.no_sync for chunk in self.chunks]
            modules[0].config.no_sync_func = syncs[0] if len(syncs) == 1 else syncs
        self._reference: list[torch.nn.Module] | None = None
        self._parking = Parking()
        self.start_optimizer(config.optim, total_updates=1)

    def start_optimizer(self, optim: OptimConfig, total_updates: int) -> None:
        """Begin a new schedule of ``total_updates`` updates with fresh optimizer state."""
        self.optimizer = build_optimizer(self.chunks, optim, self._config.parallel, dtype_of(self._config.model.dtype))
        self._optim, self._total_updates, self.num_updates = optim, total_updates, 0

    def logprobs(self, batch: TrainBatch) -> list[NDArray[np.float32]]:
        """log pi_theta of each micro-batch, [T], on every rank of the replica."""
        return batch_logprobs(self.chunks, batch, self._distribution)

    def reference_logprobs(self, batch: TrainBatch) -> list[NDArray[np.float32]]:
        """log pi_ref of each micro-batch, [T], on every rank of the replica."""
        if self._reference is None:
            raise RuntimeError("no reference model is kept; call keep_reference first (algorithm.kl_coef > 0)")
        return batch_logprobs(self._reference, batch, self._distribution)

    def update(self, batch: TrainBatch, loss: LossFn) -> UpdateStats:
        """One optimizer step on the mean gradient of ``loss`` over the global batch.

        Raises:
            NonFiniteError: loss or gradient norm is NaN or infinite, on every rank alike; weights are unchanged.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def on_tokens(micro: MicroBatch, values: TokenValues) -> tuple[Tensor, Mapping[str, Tensor]]:
            out = loss(_loss_inputs(micro, values), batch.num_loss_tokens, batch.num_sequences)
            return out.loss, _record(out)

        records = run_schedule(self.chunks, batch.microbatches, self._distribution, on_tokens, forward_only=False)
        totals = self._totals(records)
        if not math.isfinite(totals["loss"]):
            raise NonFiniteError(f"loss is {totals['loss']} in update {self.num_updates + 1}; no rank has stepped")
        finalize_model_grads(self.chunks)
        return self._step(totals, batch.num_loss_tokens)

    def keep_reference(self, path: Path) -> None:
        """Load a Hugging Face checkpoint as the reference model, in memory of its own and without gradients."""
        self._reference = self._build(open_checkpoint(path))
        for chunk in self._reference:
            chunk.requires_grad_(requires_grad=False)

    def refresh_reference(self) -> None:
        """Make the reference model what the policy is now. Raises RuntimeError when none is kept."""
        if self._reference is None:
            raise RuntimeError("no reference model is kept; call keep_reference first (algorithm.kl_coef > 0)")
        self.finish_updates()
        with torch.no_grad():
            for reference, chunk in zip(self._reference, self.chunks, strict=True):
                for kept, now in zip(reference.parameters(), chunk.module.parameters(), strict=True):
                    kept.copy_(now)

    @property
    def reference(self) -> Sequence[torch.nn.Module]:
        """This rank's chunks of the reference model; empty when none is kept."""
        return self._reference or ()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under Hugging Face names, in the same order on every rank."""
        self.finish_updates()
        return export_hf([chunk.module for chunk in self.chunks])

    def finish_updates(self) -> None:
        """Make this rank's weights final: with overlap, other replicas' shares are old until the next forward pass."""
        if self._config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def offload(self) -> int:
        """Move optimizer state to the host and drop gradients, where the engine shares a GPU; returns bytes moved."""
        return self.park() if device().type == "cuda" else 0

    def park(self) -> int:
        """Do so on any device."""
        self.optimizer.zero_grad()
        return self._parking.park(optimizer_tensors(self.chunks, self.optimizer), gradient_buffers(self.chunks))

    def onload(self) -> int:
        """Bring optimizer state back, and room for gradients, if they are away; returns bytes moved."""
        return self._parking.restore()

    def _build(self, weights: TensorReader) -> list[torch.nn.Module]:
        modules = build_model(self._config.model.path, parallel=self._config.parallel, model=self._config.model)
        load_checkpoint(modules, weights)
        return modules

    def _step(self, totals: dict[str, float], num_tokens: int) -> UpdateStats:
        lr = lr_at(self.num_updates, self._optim, self._total_updates)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.prepare_grads()  # step() does it again, to the same effect
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise NonFiniteError(f"gradient norm is {grad_norm} in update {self.num_updates + 1}; no rank has stepped")
        self.optimizer.step()
        self.num_updates += 1
        metrics = {
            name.removeprefix("max:"): value if name.startswith("max:") else value / num_tokens
            for name, value in totals.items()
            if name != "loss"
        }
        return UpdateStats(loss=totals["loss"], grad_norm=grad_norm, lr=lr, metrics=metrics)

    def _totals(self, records: list[Mapping[str, Tensor]]) -> dict[str, float]:
        """Sums (and maxima) over micro-batches and replicas, equal on every rank; ranks of one replica hold copies."""
        mine: dict[str, float] = {}
        if parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0:
            _accumulate(mine, [{name: float(value) for name, value in record.items()} for record in records])
        totals: dict[str, float] = {}
        _accumulate(totals, self._collectives.all_gather(mine))
        return totals


@torch.no_grad()
def batch_logprobs(
    chunks: Sequence[torch.nn.Module], batch: TrainBatch, distribution: TokenDistribution
) -> list[NDArray[np.float32]]:
    """Log-probs of each micro-batch, [T], 0 outside its loss mask, on every rank of the replica. Collective."""

    def on_tokens(micro: MicroBatch, values: TokenValues) -> tuple[Tensor, Tensor]:
        return values.logprobs.sum(), values.scatter(len(micro.input_ids))

    records = run_schedule(chunks, batch.microbatches, distribution, on_tokens, forward_only=True)
    values = records or [
        torch.empty(len(micro.input_ids), dtype=torch.float32, device=device()) for micro in batch.microbatches
    ]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    for value in values:
        torch.distributed.broadcast(value, last, group=parallel_state.get_pipeline_model_parallel_group())
    return [value.cpu().numpy() for value in values]


def _loss_inputs(micro: MicroBatch, values: TokenValues) -> LossInputs:
    """The loss sees the N loss tokens only, in order."""
    rows = values.rows.cpu().numpy()

    def pick(array: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(array[rows]).to(values.logprobs.device)

    def pick_optional(array: NDArray[np.float32] | None) -> Tensor | None:
        return None if array is None else pick(array)

    in_sequence = count_tokens_in_sequence(micro.loss_mask, micro.cu_seqlens)
    numbers = torch.from_numpy(sequence_numbers(micro.cu_seqlens)[rows])
    return LossInputs(
        logprobs=values.logprobs,
        entropy=values.entropy,
        loss_mask=torch.ones_like(values.logprobs, dtype=torch.bool),
        advantages=pick(micro.advantages),
        rollout_logprobs=pick(micro.rollout_logprobs),
        old_logprobs=pick_optional(micro.old_logprobs),
        ref_logprobs=pick_optional(micro.ref_logprobs),
        sequence=numbers.to(values.logprobs.device),
        tokens_in_sequence=pick(in_sequence),
    )


def _record(out: LossOutput) -> dict[str, Tensor]:
    """What a micro-batch adds to the update's totals; ``max:`` marks what is maximised, not summed."""
    sums = {"loss": out.loss.detach(), **out.metrics}
    return sums | {f"max:{name}": value for name, value in out.maxima.items()}


def _accumulate(into: dict[str, float], records: list[dict[str, float]]) -> None:
    for record in records:
        for name, value in record.items():
            if name.startswith("max:"):
                into[name] = max(into.get(name, -math.inf), value)
            else:
                into[name] = into.get(name, 0.0) + value
