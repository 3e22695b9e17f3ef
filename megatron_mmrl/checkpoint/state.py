"""Everything a rank needs to go on bit for bit: weights, optimizer, random generators, and the caller's own facts.

Each rank writes its own part in its own layout, so saving and loading move no tensor between ranks; the price is that
a run continues with the same parallel sizes (weights for other layouts: the Hugging Face export).
``megatron.core.dist_checkpointing`` (0.16.1) is not used: it keeps a helper process with a pickle server alive, forks
for every save, and its metadata is a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_mmrl.checkpoint.manifest import STATE_FILE, CheckpointError
from megatron_mmrl.checkpoint.rng import restore_rng, rng_json, rng_tensors
from megatron_mmrl.checkpoint.tensors import TensorFile, open_tensors, write_tensors

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallel

_MAIN = "main"  # the float32 weights that the optimizer updates; other keys are the optimizer's own


def save_training_state(
    directory: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    extra: Mapping[str, Any],
) -> None:
    """Write this rank's part of the training state. Collective.

    Args:
        directory: exists; the same on every rank.
        chunks: this rank's model chunks.
        optimizer: Megatron's, over those chunks.
        extra: what the caller needs back, as JSON has it (step, data position, ...); rank 0's is kept.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:  # else other replicas' shares of the weights are one update old
            chunk.start_param_sync(force_sync=True)
    rank = dist.get_rank()
    if _first_replica() == rank:
        write_tensors(directory / _model_file(rank), dict(_model_tensors(chunks)))
    if _optimizer_writer(optimizer) == rank:
        write_tensors(directory / _optimizer_file(rank), dict(_optimizer_tensors(chunks, optimizer)))
    write_tensors(directory / f"rng_{rank:05d}.safetensors", rng_tensors())
    own = {"rng": rng_json(), "group_steps": _group_steps(optimizer)}
    (directory / f"rank_{rank:05d}.json").write_text(json.dumps(own))
    if rank == 0:
        state = {"layout": _layout(chunks), "extra": dict(extra)}
        (directory / STATE_FILE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n")


def load_training_state(
    directory: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> dict[str, Any]:
    """Overwrite weights, optimizer state and random generators; returns ``extra``. Collective.

    Raises:
        CheckpointError: other parallel sizes, or a tensor that the model does not have in this shape and dtype.
    """
    extra = load_weights(directory, chunks)
    rank = dist.get_rank()
    own = json.loads((directory / f"rank_{rank:05d}.json").read_text())
    with open_tensors(directory / _optimizer_file(_optimizer_writer(optimizer))) as file:
        _load_optimizer(file, chunks, optimizer)
    _set_group_steps(optimizer, own["group_steps"])
    with open_tensors(directory / f"rng_{rank:05d}.safetensors") as file:
        restore_rng({name: file.read(name) for name in file.names}, own["rng"])
    return extra


def save_reference(directory: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Write the reference model of this rank (its chunks, not wrapped) beside the training state. Collective."""
    rank = dist.get_rank()
    if _first_replica() == rank:
        write_tensors(directory / _reference_file(rank), dict(_module_tensors(chunks)))


def load_reference(directory: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Overwrite the reference model by what ``save_reference`` wrote. Collective.

    Raises:
        CheckpointError: it was not saved, or is of another model.
    """
    _read_into(directory / _reference_file(_first_replica()), dict(_module_tensors(chunks)))


def load_weights(directory: Path, chunks: Sequence[DistributedDataParallel]) -> dict[str, Any]:
    """Overwrite the weights only (the optimizer's float32 copies are left alone); returns ``extra``. Collective.

    Raises:
        CheckpointError: see ``load_training_state``.
    """
    state = json.loads((directory / STATE_FILE).read_text())
    if state["layout"] != _layout(chunks):
        raise CheckpointError(
            f"{directory} was written with parallel sizes {state['layout']}, this run has {_layout(chunks)}; "
            "use the same sizes, or start anew from its Hugging Face export"
        )
    _read_into(directory / _model_file(_first_replica()), dict(_model_tensors(chunks)))
    return state["extra"]


def _read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with open_tensors(path) as file:
        if file.names != tensors.keys():
            raise CheckpointError(
                f"{path.parent} and the model differ in the weights {sorted(file.names ^ tensors.keys())[:4]}"
            )
        for name, tensor in tensors.items():
            file.read_into(name, tensor)


def _layout(chunks: Sequence[DistributedDataParallel]) -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": len(chunks),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _first_replica() -> int:
    """The rank that holds the same weights as this one in the first replica."""
    return dist.get_process_group_ranks(parallel_state.get_data_parallel_group(with_context_parallel=True))[0]


def _optimizer_writer(optimizer: MegatronOptimizer) -> int:
    """The rank whose file holds this rank's optimizer state: its own where replicas share it out."""
    distributed = any(isinstance(part, DistributedOptimizer) for part in _parts(optimizer))
    return dist.get_rank() if distributed else _first_replica()


def _model_file(rank: int) -> str:
    return f"model_{rank:05d}.safetensors"


def _reference_file(rank: int) -> str:
    return f"reference_{rank:05d}.safetensors"


def _optimizer_file(rank: int) -> str:
    return f"optimizer_{rank:05d}.safetensors"


def _model_tensors(chunks: Sequence[DistributedDataParallel]) -> Iterator[tuple[str, Tensor]]:
    """Of the wrapped models, see ``_module_tensors``."""
    return _module_tensors([chunk.module for chunk in chunks])


def _module_tensors(modules: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, not copies; what is no tensor (Transformer Engine's extra state) is left out."""
    for index, module in enumerate(modules):
        for name, value in module.state_dict().items():
            if isinstance(value, Tensor):
                yield f"{index}.{name}", value


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers behind the one, without those that have no parameter on this rank."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if not part.is_stub_optimizer]


def _main_params(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> Iterator[tuple[str, Tensor, MegatronOptimizer]]:
    """(name of the model's parameter, what the optimizer updates for it on this rank, its optimizer)."""
    names = {
        parameter: f"{index}.{name}"
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
    }
    for part in _parts(optimizer):
        groups = part.optimizer.param_groups
        if isinstance(part, DistributedOptimizer):
            for parameter, (group, position) in part.model_param_group_index_map.items():
                yield names[parameter], groups[group]["params"][position], part
        else:
            by_main = {getattr(parameter, "main_param", parameter): name for parameter, name in names.items()}
            for main in (main for group in groups for main in group["params"]):
                yield by_main[main], main, part


def _optimizer_tensors(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> Iterator[tuple[str, Tensor]]:
    for name, main, part in _main_params(chunks, optimizer):
        yield f"{name}/{_MAIN}", main
        for key, value in part.optimizer.state.get(main, {}).items():
            yield f"{name}/{key}", value


def _load_optimizer(file: TensorFile, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Set float32 weights and state; the state of a parameter that was never updated is empty, as it was."""
    keys: dict[str, list[str]] = {}
    for stored in file.names:
        name, _, key = stored.rpartition("/")
        keys.setdefault(name, []).append(key)
    for name, main, part in _main_params(chunks, optimizer):
        file.read_into(f"{name}/{_MAIN}", main)
        part.optimizer.state.pop(main, None)
        state = {key: file.read(f"{name}/{key}") for key in sorted(keys[name]) if key != _MAIN}
        if state:
            # torch keeps Adam's step on the host, everything else lives beside the weights
            part.optimizer.state[main] = {
                key: value if value.dim() == 0 else value.to(main.device) for key, value in state.items()
            }


def _group_steps(optimizer: MegatronOptimizer) -> list[list[int | None]]:
    """Updates so far where the optimizer counts them by group (fused Adam), else None."""
    return [
        [int(group["step"]) if "step" in group else None for group in part.optimizer.param_groups]
        for part in _parts(optimizer)
    ]


def _set_group_steps(optimizer: MegatronOptimizer, steps: list[list[int | None]]) -> None:
    for part, part_steps in zip(_parts(optimizer), steps, strict=True):
        for group, step in zip(part.optimizer.param_groups, part_steps, strict=True):
            group.pop("step", None)
            if step is not None:
                group["step"] = step
