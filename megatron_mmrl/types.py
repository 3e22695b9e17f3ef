"""The values that travel between modules: frozen, typed, with shapes in comments.

Legend: P prompt tokens (image pads expanded), R response tokens, L = P + R, T tokens of a micro-batch,
S sequences of a micro-batch, G responses per prompt, I images, N patches, D = 3 channels x 2 frames x 14 x 14 = 1176.

One convention for token indices, stated only here: entry t of a per-token array describes
*predicting* ``input_ids[t]``. The first token of a sequence is predicted by nothing and is masked out.

Arrays are numpy, so that nothing that only plans or scores has to load torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Finish = Literal["stop", "length", "abort"]
IMAGE_TAG = "<image>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat turn. ``text`` holds one ``<image>`` tag where each image stands."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question as read from a data file, before any tokenizer.

    Example: ``Prompt(id="test.parquet:17", source="digits/read", messages=(Message(role="user",
    text="<image>What digit is this?"),), images=(b"\\x89PNG...",), answer="7")``.
    """

    id: str  # unique in a run: "<file name>:<row>"
    source: str  # the data set it came from (``data_source``)
    messages: tuple[Message, ...]
    images: tuple[bytes, ...]  # encoded files (PNG, JPEG, ...), one per <image> tag, in order
    answer: str  # gold answer
    meta: Mapping[str, object] = field(default_factory=dict)  # other columns, as JSON values: docs/data.md


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt after the one processor call that trainer and engine both rely on."""

    prompt: Prompt
    ids: NDArray[np.int64]  # [P]; image pads expanded: what the model reads
    engine_ids: NDArray[np.int64]  # one pad per image: what SGLang is sent (it expands them itself)
    images: tuple[bytes, ...]  # lossless PNG of exactly what was processed: what SGLang is sent
    pixel_values: NDArray[np.float32]  # [N, D]; N = 0 for text only
    image_grid_thw: NDArray[np.int64]  # [I, 3], in patches


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the engine draws tokens. Log-probs are those of softmax(mask(penalise(logits)) / temperature)."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: off
    repetition_penalty: float = 1.0  # of tokens that the response already holds; 1: off
    max_new_tokens: int = 64
    num_samples: int = 1  # per prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One completion, as the engine sampled it."""

    ids: NDArray[np.int64]  # [R], the end-of-turn token included where it was drawn
    logprobs: NDArray[np.float32]  # [R], nats, of the sampling distribution
    finish: Finish
    policy_version: int  # step whose weights sampled it
    text: str  # decoded without special tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the rewards said of one response: ``total`` = sum of weight x term."""

    total: float
    terms: Mapping[str, float]  # raw (unweighted) value of each reward
    error: str | None = None  # why a term was set to 0 (time limit, exception), else None
    extras: Mapping[str, float] = field(default_factory=dict)  # "<term>/<name>": further numbers of a user's reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt with its G responses; each phase of the step returns a new one."""

    prompt: EncodedPrompt
    responses: tuple[Response, ...]  # length G
    scores: tuple[Score, ...] | None = None  # length G

    @property
    def rewards(self) -> NDArray[np.float64]:
        """Total rewards, shape [G]. Raises ValueError before scoring."""
        if self.scores is None:
            raise ValueError(f"group {self.prompt.prompt.id} has not been scored")
        return np.array([score.total for score in self.scores], dtype=np.float64)

    def with_scores(self, scores: tuple[Score, ...]) -> Group:
        return replace(self, scores=scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """Prompt + response as the trainer reads it; per-token arrays follow the index convention above."""

    ids: NDArray[np.int64]  # [L]
    loss_mask: NDArray[np.bool_]  # [L], true on the tokens that are learned from
    advantages: NDArray[np.float32]  # [L], 0 outside the mask
    rollout_logprobs: NDArray[np.float32]  # [L], 0 outside the mask
    pixel_values: NDArray[np.float32]  # [N, D]
    image_grid_thw: NDArray[np.int64]  # [I, 3]
    old_logprobs: NDArray[np.float32] | None = None  # [L], trainer's log pi_old; None: same as the current policy
    ref_logprobs: NDArray[np.float32] | None = None  # [L]; None: no KL term


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward pass of one data-parallel rank reads.

    Packed (``num_rows is None``): sequences one after the other, bounds in ``cu_seqlens``; padding at the
    end is a dummy sequence of its own, so ``cu_seqlens[-1] == T``. Context parallelism needs sequences that its ranks
    can divide: padding at the end of one's slot belongs to it.
    Padded (``num_rows = B``): T = B x row length, row-major, each row one sequence padded on the right.
    """

    input_ids: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [3, T], mrope rows t, h, w
    cu_seqlens: NDArray[np.int32]  # [S + 1]
    num_rows: int | None
    loss_mask: NDArray[np.bool_]  # [T]
    advantages: NDArray[np.float32]  # [T]
    rollout_logprobs: NDArray[np.float32]  # [T]
    old_logprobs: NDArray[np.float32] | None  # [T]
    ref_logprobs: NDArray[np.float32] | None  # [T]
    pixel_values: NDArray[np.float32]  # [N, D]
    image_grid_thw: NDArray[np.int64]  # [I, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One optimizer step's worth of micro-batches of *this* data-parallel rank, with global denominators."""

    microbatches: tuple[MicroBatch, ...]  # equally many on every data-parallel rank
    num_loss_tokens: int  # true entries of loss_mask over all micro-batches and data-parallel ranks
    num_sequences: int  # sequences with at least one loss token, likewise global


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """What one optimizer step reports, equal on every rank."""

    loss: float
    grad_norm: float
    lr: float
    metrics: Mapping[str, float]  # token means over the whole mini-batch: entropy, clip_fraction, kl, ...
