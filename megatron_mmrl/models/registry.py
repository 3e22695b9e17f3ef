"""Which models exist, by the ``model_type`` of a checkpoint's ``config.json``. Loads torch only to build one."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.config.checks import require
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig

if TYPE_CHECKING:
    from megatron_mmrl.models.hf_io import TensorReader
    from megatron_mmrl.models.qwen2_5_vl.model import Qwen25VL
    from megatron_mmrl.models.stored import StoredModel
    from megatron_mmrl.parallel.engine_sharding import EngineEntry
    from megatron_mmrl.parallel.layout import ParallelLayout
    from megatron_mmrl.parallel.sharding import WeightEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Where a model's functions are, as ``module:function``; imported when used."""

    build: str
    """(path, parallel, model) -> list of chunks."""
    position_ids: str
    """(ids, image_grid_thw, *, image_token_id, merge_size) -> int64 [3, L]."""
    stored: str
    """(path) -> StoredModel."""
    shapes: str
    """(config.json) -> shape of every tensor by Hugging Face name; loads no torch."""
    held: str
    """(config.json, layout) -> (stage, chunk, WeightEntry) of every parameter that the layout's ranks hold."""
    engine: str
    """(config.json, *, whole_encoder) -> EngineEntry of every parameter of the engine's model."""


MODELS: dict[str, ModelSpec] = {
    "qwen2_5_vl": ModelSpec(
        build="megatron_mmrl.models.qwen2_5_vl.model:build",
        position_ids="megatron_mmrl.models.qwen2_5_vl.mrope:position_ids",
        stored="megatron_mmrl.models.qwen2_5_vl.stored:describe",
        shapes="megatron_mmrl.models.qwen2_5_vl.sizes:tensor_shapes",
        held="megatron_mmrl.models.qwen2_5_vl.held:held",
        engine="megatron_mmrl.models.qwen2_5_vl.engine_weights:engine_table",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a checkpoint from its JSON files alone."""

    model_type: str
    vocab_size: int
    """Rows of the embedding; more than the tokenizer has ids."""
    tied: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    merge_size: int
    """Patches of a merged patch's side: an image token stands for merge_size^2 patches."""
    eos_token_ids: tuple[int, ...]


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The checkpoint's ``config.json``. Raises ValueError when there is none, or for a model that is not supported."""
    file = Path(path) / "config.json"
    require(file.is_file(), f"model.path={path} has no config.json; give a Hugging Face checkpoint directory")
    config = json.loads(file.read_text())
    model_type = config.get("model_type")
    require(model_type in MODELS, f"model.path={path} is of model_type {model_type!r}; supported: {sorted(MODELS)}")
    return config


def model_facts(path: str | Path) -> ModelFacts:
    """Read them. Raises ValueError as ``read_hf_config`` does."""
    config = read_hf_config(path)
    text = config.get("text_config") or config
    return ModelFacts(
        model_type=config["model_type"],
        vocab_size=text["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        image_token_id=config["image_token_id"],
        video_token_id=config["video_token_id"],
        vision_start_token_id=config["vision_start_token_id"],
        vision_end_token_id=config["vision_end_token_id"],
        merge_size=config["vision_config"]["spatial_merge_size"],
        eos_token_ids=_eos_token_ids(Path(path), text),
    )


def position_ids_function(facts: ModelFacts) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]:
    """(ids [L], image_grid_thw [I, 3]) -> positions [3, L] of one sequence, for this model."""
    function = _resolve(MODELS[facts.model_type].position_ids)
    return functools.partial(function, image_token_id=facts.image_token_id, merge_size=facts.merge_size)


def build_model(path: str | Path, *, parallel: ParallelConfig, model: ModelConfig) -> list[Qwen25VL]:
    """This rank's model chunks on its device, weights not yet loaded. Needs ``parallel.state.initialize``."""
    build = _resolve(MODELS[read_hf_config(path)["model_type"]].build)
    return build(Path(path), parallel, model)


def stored_model(path: str | Path) -> StoredModel:
    """How the model of a checkpoint lies in a Megatron distributed checkpoint. Raises ValueError as ``build_model``."""
    return _resolve(MODELS[read_hf_config(path)["model_type"]].stored)(Path(path))


def held_parameters(path: str | Path, layout: ParallelLayout) -> list[tuple[int, int, WeightEntry]]:
    """(pipeline stage, chunk, entry) of every parameter that the ranks of ``layout`` hold; no model is built."""
    config = read_hf_config(path)
    return list(_resolve(MODELS[config["model_type"]].held)(config, layout))


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, by original name, a tied output layer left out. Loads no torch."""
    config = read_hf_config(path)
    return _resolve(MODELS[config["model_type"]].shapes)(config)


def engine_parameters(path: str | Path, *, whole_encoder: bool) -> tuple[EngineEntry, ...]:
    """Every parameter of the engine's model. ``whole_encoder``: SGLang's ``mm_enable_dp_encoder``."""
    config = read_hf_config(path)
    return tuple(_resolve(MODELS[config["model_type"]].engine)(config, whole_encoder=whole_encoder))


def open_checkpoint(path: str | Path) -> TensorReader:
    """The tensors of a checkpoint, in Hugging Face's files or in Megatron's (as ``mmrl convert`` writes them).

    Raises:
        ValueError: neither is there, or the files are not whole.
    """
    from megatron_mmrl.models.dist_metadata import is_megatron
    from megatron_mmrl.models.hf_io import HFReader
    from megatron_mmrl.models.megatron_io import MegatronReader, files_dir

    path = Path(path)
    return MegatronReader(path, stored_model(files_dir(path))) if is_megatron(path) else HFReader(path)


def load_checkpoint(chunks: Sequence[Qwen25VL], reader: TensorReader) -> None:
    """Fill the chunks from a checkpoint; each rank reads only its shards.

    Raises:
        ValueError: a tensor is missing or has another shape than the model.
    """
    from megatron.core import parallel_state

    from megatron_mmrl.models.hf_io import load_parameters

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for chunk in chunks:
        load_parameters(chunk, chunk.weight_table(), reader, rank, size)


def _eos_token_ids(path: Path, text: Mapping[str, Any]) -> tuple[int, ...]:
    """From generation_config.json, which transformers generates by, else from config.json."""
    file = path / "generation_config.json"
    generation = json.loads(file.read_text()) if file.is_file() else {}
    ids = generation.get("eos_token_id", text.get("eos_token_id"))
    require(ids is not None, f"neither {file} nor config.json beside it names an eos_token_id")
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _resolve(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
