"""Bytes that forward and backward passes of the trainer keep, beyond weights, gradients and optimizer state.

Counted in what our modules and those of Megatron-core 0.16.1, with its fused kernels off, keep for backward
(``models/qwen2_5_vl/config.py``). Of a micro-batch of T tokens a rank holds t = T / context ranks, and s = t / tensor
ranks of those where sequence parallelism divides them (else t). With h, F and d the hidden, inner and head size, a
heads and g key/value heads of a rank, and i bytes a number, a decoder layer keeps

    4 i s h           two sums with the residual and the outputs of two norms (Transformer Engine's layers);
                      ours over torch keep 24 s h in float32, and 20 s h in bfloat16, whose norms compute in float32
    i t d (3a + 3g)   turned queries and keys, what linear_qkv made, attention's output; ours 3a + 2g x context ranks
    4 t a             sums of attention, in float32
    5 i t F / tensor  gate and up, silu(gate), up + 0, and their product
    4 i t d           cosines and sines, made anew for queries and for keys (bfloat16 only)

``tests/dist/test_memory_measured.py`` compares with what a CPU run allocates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mmrl.memory.model import ITEM_BYTES, DType, ModelSizes
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.parallel.sharding import padded_vocab_size

Layers = Literal["torch", "transformer_engine"]
"""Which layers compute: ours over torch on a CPU, or Transformer Engine's on a GPU (``parallel/layers.py``)."""
_TILE_COLUMNS = {"torch": 2048, "transformer_engine": 16384}  # of trainer/logprobs.py, on a CPU and on a GPU
_INDEX_BYTES = 80  # a token's ids, positions and places, as int64
_FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What an update has a replica compute."""

    tokens: int
    """T of a micro-batch, padding included; its context-parallel ranks share them."""
    loss_tokens: int
    """Of them, those whose log-probs count."""
    patches: int
    """Of the different images of a micro-batch, those that one rank encodes while the tower is trained."""
    patches_of_image: int
    """Of the largest image."""
    microbatches: int
    """Of one update, per replica."""
    chunk_tokens: int
    """``trainer.logprob_chunk_tokens``"""
    span: int
    """Tokens of the sequence that a token is in, on average over the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What decides how much of a layer is kept."""

    layout: ParallelLayout
    sequence_parallel: bool
    dtype: DType
    recompute: Literal["none", "full", "selective"]
    layers: Layers
    trains_vision: bool
    """The tower below the merger has gradients."""
    trains_merger: bool

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return ITEM_BYTES[self.dtype]

    @property
    def scattered(self) -> bool:
        """Norms and sums are divided over the tensor-parallel ranks."""
        return self.sequence_parallel and self.layout.tensor > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBytes:
    """Of one rank of one stage, at the peak of an update."""

    kept: int
    """For the backward passes of all micro-batches in flight."""
    images: int
    """The same of the vision tower."""
    work: int
    """What the largest step besides needs for as long as it runs."""

    @property
    def total(self) -> int:
        return self.kept + self.images + self.work


def stage_activations(model: ModelSizes, setting: Setting, load: Workload, stage: int) -> ActivationBytes:
    """At the peak of forward and backward passes on a rank of pipeline stage ``stage``."""
    layout = setting.layout
    chunks = in_flight(layout, stage, load.microbatches)
    layers = model.text.layers // (layout.pipeline * layout.virtual_pipeline)
    first, last = stage == 0, stage == layout.pipeline - 1
    # Chunks that embed, or end in the norm, are some of those in flight.
    ends = -(-chunks // layout.virtual_pipeline)
    kept = chunks * (layers * kept_of_layer(model, setting, load) + _input(model, setting, load))
    kept += chunks * load.tokens * (_INDEX_BYTES + 2 * model.text.head_dim * _FLOAT32 // layout.context)
    if layout.virtual_pipeline > 1:
        kept += 2 * _input(model, setting, load)  # sent and received while another chunk computes (overlap_p2p_comm)
    if first and setting.scattered:
        kept += ends * _embedding_surplus(model, setting, load)
    work = [_layer_work(model, setting, load)]
    if last:
        kept += _final_norm(model, setting, load)
        work.append(head_work(model, setting, load))
    images = ends * kept_of_patch(model, setting) * load.patches if first else 0
    if first:
        work.append(_encoding_work(model, setting, load) - kept // max(1, chunks))  # before that micro-batch's layers
    return ActivationBytes(kept=kept, images=images, work=max(work))


def in_flight(layout: ParallelLayout, stage: int, microbatches: int) -> int:
    """Chunks' forward passes that wait for their backward passes at most (``schedules.get_pp_rank_microbatches`` + 1).

    1F1B: the stages behind and itself; interleaved: 2 x the stages behind, + (chunks - 1) x stages, + 1.
    """
    behind = layout.pipeline - stage - 1
    if layout.virtual_pipeline == 1:
        return min(microbatches, behind + 1)
    waiting = 2 * behind + (layout.virtual_pipeline - 1) * layout.pipeline + 1
    return min(microbatches * layout.virtual_pipeline, waiting)


def kept_of_layer(model: ModelSizes, setting: Setting, load: Workload) -> int:
    """Bytes that one decoder layer keeps of one micro-batch, its input left out: that is the layer's before it.

    Full recomputation keeps nothing but the layer's output, which is the next one's input.
    """
    if setting.recompute == "full":
        return _scattered_tokens(setting, load) * model.text.hidden * setting.item
    return _whole_layer(model, setting, load, selective=setting.recompute == "selective")


def head_work(model: ModelSizes, setting: Setting, load: Workload) -> int:
    """Log-probs (``trainer/logprobs.py``), in backward: N rows of hidden states and their gradient, two tiles of
    logits, the gradient of the output layer, and one tile of it in float32."""
    text, item, cuts = model.text, setting.item, setting.layout
    rows = -(-load.loss_tokens // cuts.context)
    shard = padded_vocab_size(text.vocab_size, cuts.tensor) // cuts.tensor
    tile = min(_TILE_COLUMNS[setting.layers], shard)
    scratch = 2 * min(load.chunk_tokens, rows) * tile * _FLOAT32
    forward = rows * text.hidden * item + scratch
    backward = forward + rows * text.hidden * _FLOAT32 + shard * text.hidden * item
    if item < _FLOAT32:  # products are made in bfloat16 and summed in float32
        chunk = min(load.chunk_tokens, rows)
        backward += tile * text.hidden * (_FLOAT32 + item) + chunk * (tile + text.hidden) * item
    return backward


def kept_of_patch(model: ModelSizes, setting: Setting) -> int:
    """Bytes that the vision tower (Hugging Face's) keeps of one patch.

    With h and F its sizes, a block keeps 3h of queries, keys and values, 2h of the turned ones, 2h of what attention
    gives, 4F of the MLP; of each of its two norms, which compute in float32: the input and the product in float32, or
    input in float32, product and output in bfloat16; and in float32 the two sums with the residual.
    """
    if not (setting.trains_vision or setting.trains_merger):
        return 0
    vision, item = model.vision, setting.item
    norm = 4 * vision.hidden + 2 * item * vision.hidden if item < _FLOAT32 else 2 * item * vision.hidden
    residual = 0 if item < _FLOAT32 else 2 * item * vision.hidden
    merger = norm + 3 * item * vision.hidden
    if not setting.trains_vision:
        return merger + item * vision.hidden
    block = item * (7 * vision.hidden + 4 * vision.inner) + 2 * norm + residual
    return vision.depth * block + merger + vision.patch_values * item


def _whole_layer(model: ModelSizes, setting: Setting, load: Workload, *, selective: bool) -> int:
    text, cuts, item = model.text, setting.layout, setting.item
    held = load.tokens // cuts.context
    on_torch = setting.layers == "torch"
    heads, groups = text.heads // cuts.tensor, max(1, text.groups // cuts.tensor)
    # Values are a view of what linear_qkv made; with fewer groups than ranks that is all ranks' part.
    mixed = (text.heads + 2 * text.groups if cuts.tensor > text.groups else heads + 2 * groups) * text.head_dim
    turned = (heads + groups) * text.head_dim
    if selective:
        attention = turned + mixed + heads * text.head_dim
    elif on_torch:
        attention = (3 * heads + 2 * groups * cuts.context) * text.head_dim
    else:
        attention = turned + mixed + heads * text.head_dim
    angles = 4 * text.head_dim if item < _FLOAT32 else 0
    inner = 5 * text.inner // cuts.tensor
    norms = _scattered_tokens(setting, load) * text.hidden * _norm_bytes(setting)
    sums = held * heads * _FLOAT32  # one per row of attention
    # torch makes float32 of the mask that says which token of which context rank reads which.
    mask = held * load.span * _FLOAT32 if on_torch and cuts.context > 1 else 0
    return norms + item * held * (attention + angles + inner) + sums + mask


def _norm_bytes(setting: Setting) -> int:
    """Of a layer's two norms and two sums with the residual, for each number of the hidden states.

    Transformer Engine keeps a norm's input, which is the sum, and its output; torch's (composite, on a CPU) keeps in
    float32 what is multiplied by the weight, and in bfloat16 a float32 copy of the input instead of the input.
    """
    if setting.layers == "transformer_engine":
        return 4 * setting.item
    return 2 * (2 * _FLOAT32 + setting.item) if setting.item < _FLOAT32 else 6 * _FLOAT32


def _scattered_tokens(setting: Setting, load: Workload) -> int:
    """s"""
    return load.tokens // (setting.layout.context * (setting.layout.tensor if setting.scattered else 1))


def _input(model: ModelSizes, setting: Setting, load: Workload) -> int:
    """Of a chunk's first layer: the embeddings, or what the stage before sent."""
    return _scattered_tokens(setting, load) * model.text.hidden * setting.item


def _embedding_surplus(model: ModelSizes, setting: Setting, load: Workload) -> int:
    """A rank's part of the embeddings is a view of all of them."""
    whole = load.tokens // setting.layout.context * model.text.hidden * setting.item
    return whole - _input(model, setting, load)


def _final_norm(model: ModelSizes, setting: Setting, load: Workload) -> int:
    """Hidden states of all held tokens, and with torch's norm what it computed in float32."""
    whole = load.tokens // setting.layout.context * model.text.hidden * setting.item
    if setting.layers == "transformer_engine":
        return whole
    copies = 2 if setting.item < _FLOAT32 else 1
    return whole + copies * _scattered_tokens(setting, load) * model.text.hidden * _FLOAT32


def _layer_work(model: ModelSizes, setting: Setting, load: Workload) -> int:
    """Backward of a layer: gradients of the MLP's product and of one of its factors, of the hidden states twice (the
    norm's input is gathered again), and of the second linear layer's weight; with recomputation also all that the layer
    keeps, made again."""
    text, cuts, item = model.text, setting.layout, setting.item
    held = load.tokens // cuts.context
    gradients = held * (text.inner // cuts.tensor + 2 * text.hidden) + text.hidden * text.inner // cuts.tensor
    again = 0
    if setting.recompute == "full":
        again = _whole_layer(model, setting, load, selective=False)
    elif setting.recompute == "selective" and setting.layers == "torch":
        again = held * (2 * text.heads + 2 * text.groups) // cuts.tensor * text.head_dim * item
    return item * gradients + again


def _encoding_work(model: ModelSizes, setting: Setting, load: Workload) -> int:
    """A frozen tower encodes one image at a time and keeps nothing: about a block's MLP, norms and attention."""
    vision = model.vision
    row = (
        vision.patch_values * _FLOAT32
        + vision.hidden * (4 * _FLOAT32 + 7 * setting.item)
        + 3 * vision.inner * setting.item
    )
    return 0 if setting.trains_vision else load.patches_of_image * row
