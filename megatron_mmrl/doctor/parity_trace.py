"""What passes through a model at each stage, seen by hooks: the same stages of Hugging Face's model and of Megatron's.

Hugging Face runs one sequence; Megatron runs packs, of which one sequence in one micro-batch is wanted, and a rank
holds some of the layers and some of the rows. ``parity_compare`` says what the stages are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Sink = Callable[[str, Tensor], None]


@dataclass(slots=True, kw_only=True)
class Recorder:
    """Keeps the values of one pass; ``wanted_call`` numbers the passes of a module that is run several times."""

    wanted_call: int = 0
    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)

    def __call__(self, stage: str, value: Tensor) -> None:
        call = self._calls[stage] = self._calls.get(stage, -1) + 1
        if call == self.wanted_call:
            self.values[stage] = as_array(value)


def as_array(value: Tensor) -> NDArray[np.float32]:
    """A float32 copy on the host."""
    return value.detach().to("cpu", torch.float32, copy=True).numpy()


@contextmanager
def hooked_hf(model: nn.Module, images: Sequence[NDArray[np.float32]]) -> Iterator[Recorder]:
    """Record a pass of Hugging Face's model over one sequence: rows [L, H], positions [3, L] as [L, 3]."""
    recorder = Recorder()
    text = model.model.language_model
    with ExitStack() as hooks:
        _on_input(hooks, text.rotary_emb, 1, lambda x: recorder("positions", x[:, 0].T))
        _on_input(hooks, text.layers[0], 0, lambda x: recorder("embeddings", x[0]))
        for number, layer in enumerate(text.layers):
            stage = f"model.layers.{number}"
            _on_output(hooks, layer.self_attn, lambda x, stage=stage: recorder(f"{stage}.self_attn", x[0]))
            _on_output(hooks, layer, lambda x, stage=stage: recorder(f"{stage}.mlp", x[0]))
        _on_output(hooks, text.norm, lambda x: recorder("model.norm", x[0]))
        hook_vision(hooks, model.model.visual, images, recorder.values)
        yield recorder


@contextmanager
def hooked_chunks(
    chunks: Sequence[nn.Module], micro_batch: int, images: Sequence[NDArray[np.float32]]
) -> Iterator[Recorder]:
    """Record what this rank computes in one micro-batch of a packed schedule.

    Rows are this rank's, in its order, [T / tp / cp, H] or [T / cp, H]; positions are those of the whole pack, [T, 3].
    Vision stages are kept for ``images`` as far as this rank encodes them, under ``<stage>@<image>``.
    """
    recorder = Recorder(wanted_call=micro_batch)
    with ExitStack() as hooks:
        for chunk in chunks:
            _hook_chunk(hooks, chunk, recorder)
            if getattr(chunk, "visual", None) is not None:
                hook_vision(hooks, chunk.visual, images, recorder.values)
        yield recorder


def _hook_chunk(hooks: ExitStack, chunk: nn.Module, record: Sink) -> None:
    def on_call(_: nn.Module, __: tuple[object, ...], inputs: Mapping[str, Tensor]) -> None:
        if chunk.pre_process:
            record("positions", inputs["position_ids"][:, 0].T)

    hooks.callback(chunk.register_forward_pre_hook(on_call, with_kwargs=True).remove)
    decoder = chunk.language_model.decoder
    for layer in decoder.layers:
        if layer.layer_number == 1:
            _on_input(hooks, layer, "hidden_states", lambda x: record("embeddings", x[:, 0]))
        stage = f"model.layers.{layer.layer_number - 1}"
        _on_output(hooks, layer.self_attention, lambda x, stage=stage: record(f"{stage}.self_attn", x[:, 0]))
        _on_output(hooks, layer, lambda x, stage=stage: record(f"{stage}.mlp", x[:, 0]))
    if chunk.post_process:
        _on_output(hooks, decoder.final_layernorm, lambda x: record("model.norm", x[:, 0]))


def hook_vision(
    hooks: ExitStack, tower: nn.Module, images: Sequence[NDArray[np.float32]], into: dict[str, NDArray[np.float32]]
) -> None:
    """Record the tower's stages of the given images (patches [n, D]) as ``<stage>@<image>``: [n or n / merge^2, H].

    An image is recognised by its pixels, whoever encodes it and in whatever company. Only hooks after the forward are
    used: those before it are called for other ends as well (``models/qwen2_5_vl/vision.py``).
    """
    passing: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Tensor, ...], inputs: Mapping[str, Tensor], __: object) -> None:
        pixels = args[0] if args else inputs["hidden_states"]
        sizes = (args[1] if len(args) > 1 else inputs["grid_thw"]).prod(dim=1).tolist()
        for place, number in _recognised(pixels.split(sizes), images):
            for stage, value in passing.items():
                rows = [size * len(value) // len(pixels) for size in sizes]
                into[f"{stage}@{number}"] = as_array(value.split(rows)[place])
        passing.clear()

    def pass_by(stage: str) -> Callable[[Tensor], None]:
        return lambda value: passing.update({stage: value})

    _on_output(hooks, tower.patch_embed, pass_by("visual.patch_embed"))
    for number, block in enumerate(tower.blocks):
        _on_output(hooks, block, pass_by(f"visual.blocks.{number}"))
    _on_output(hooks, tower.merger, pass_by("visual.merger"))
    hooks.callback(tower.register_forward_hook(keep, with_kwargs=True).remove)


def _recognised(parts: Sequence[Tensor], images: Sequence[NDArray[np.float32]]) -> Iterator[tuple[int, int]]:
    """(number in ``parts``, number in ``images``) of equal pixels, rounded as the tower is given them."""
    for place, patches in enumerate(parts):
        for number, image in enumerate(images):
            if torch.equal(patches.cpu(), torch.from_numpy(image).to(patches.dtype)):
                yield place, number


def joined_images(values: Mapping[str, NDArray[np.float32]], num_images: int) -> dict[str, NDArray[np.float32]]:
    """``<stage>@<image>`` of all images as one array per stage; a stage that lacks an image is left out."""
    stages = dict.fromkeys(name.partition("@")[0] for name in values if "@" in name)
    names = {stage: [f"{stage}@{number}" for number in range(num_images)] for stage in stages}
    return {
        stage: np.concatenate([values[name] for name in parts])
        for stage, parts in names.items()
        if all(name in values for name in parts)
    }


def _on_input(hooks: ExitStack, module: nn.Module, which: int | str, use: Callable[[Tensor], None]) -> None:
    """Use an argument by position or name, however the caller passes the others."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> None:
        use(args[which] if isinstance(which, int) else inputs.get(which, args[0] if args else None))

    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _on_output(hooks: ExitStack, module: nn.Module, use: Callable[[Tensor], None]) -> None:
    def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        use(output[0] if isinstance(output, tuple) else output)

    hooks.callback(module.register_forward_hook(hook).remove)
