"""Where two readings of the same tokens part ways: pure comparisons of arrays, and the words for what was found.

A *stage* is a place in the model where both sides can be looked at, named as in the checkpoint: ``positions``,
``visual.patch_embed``, ``visual.blocks.N``, ``visual.merger``, ``embeddings`` (image features put in),
``model.layers.N.self_attn`` (with the norm before it), ``model.layers.N.mlp`` (likewise; its value is what the next
layer reads), ``model.norm``, ``lm_head``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Trace = Mapping[str, NDArray[np.float32]]
"""Stage -> values [rows, features], in the order in which the model goes through them."""

_SHOWN = 3  # tensors named in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of token log-probs, in nats."""

    max: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """A weight that is not what the checkpoint says."""

    names: tuple[str, ...]  # of the checkpoint's tensors that the weight is made of, original scheme
    kind: str  # reads after the names: "is all zeros"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageError:
    """How far a stage is from the reference, and how far it may be."""

    stage: str
    error: float
    allowed: float


def difference(left: Sequence[NDArray[np.float32]], right: Sequence[NDArray[np.float32]]) -> Difference:
    """Of arrays in pairs, over all their tokens; NaN counts as infinite.

    Raises:
        ValueError: unequal numbers of arrays or tokens, or no token at all.
    """
    if [x.shape for x in left] != [x.shape for x in right] or not sum(x.size for x in left):
        raise ValueError(f"log-probs of shapes {[x.shape for x in left]} and {[x.shape for x in right]}; give pairs")
    gaps = np.concatenate([np.abs(x.astype(np.float64) - y) for x, y in zip(left, right, strict=True)])
    gaps = np.where(np.isnan(gaps), np.inf, gaps)
    return Difference(max=float(gaps.max()), mean=float(gaps.mean()))


def relative_error(ours: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """The largest |ours - reference| / |reference| of a row (Euclidean norms); infinite for NaN or other shapes."""
    if ours.shape != reference.shape:
        return float("inf")
    gap = np.linalg.norm(ours.astype(np.float64) - reference, axis=-1)
    size = np.linalg.norm(reference.astype(np.float64), axis=-1)
    errors = gap / np.maximum(size, np.finfo(np.float32).tiny)
    return float(np.where(np.isnan(errors), np.inf, errors).max(initial=0.0))


def stage_errors(ours: Trace, reference: Trace, rounded: Trace, tolerance: float) -> list[StageError]:
    """The stages that both sides have, in the order of ``reference``.

    Args:
        rounded: the reference computed in our precision; a stage may be twice as far off as that is.
        tolerance: what a stage may be off in any case. Positions must be equal.
    """
    errors = []
    for stage in (stage for stage in reference if stage in ours):
        allowed = max(tolerance, 2 * relative_error(rounded[stage], reference[stage]))
        error = relative_error(ours[stage], reference[stage])
        errors.append(StageError(stage=stage, error=error, allowed=0.0 if stage == "positions" else allowed))
    return errors


def first_difference(errors: Sequence[StageError]) -> StageError | None:
    """The first stage that is further off than allowed; None when there is none."""
    return next((error for error in errors if error.error > error.allowed), None)


def stage_of(tensor: str) -> str:
    """The stage in which a tensor of the checkpoint (original name) is first used."""
    layer = re.match(r"(model\.layers\.\d+\.)(input_layernorm|self_attn)?", tensor)
    if layer is not None:
        return layer[1] + ("self_attn" if layer[2] else "mlp")
    match = re.match(r"visual\.(patch_embed|merger|blocks\.\d+)|model\.norm|lm_head", tensor)
    return "embeddings" if match is None else match.group()


def kind_of_difference(ours: NDArray[np.float32], expected: NDArray[np.float32]) -> str | None:
    """How a weight differs from what it should be, as the end of a sentence; None when it does not."""
    if ours.shape != expected.shape:
        return f"has shape {ours.shape} instead of {expected.shape}"
    if np.array_equal(ours, expected):
        return None
    if np.isnan(ours).any():
        return "holds NaN"
    if not ours.any():
        return "is all zeros"
    if np.array_equal(np.sort(ours, axis=None), np.sort(expected, axis=None)):
        return "holds the checkpoint's numbers in another order"
    return f"differs by up to {np.abs(ours - expected).max():.2g}"


def explain_trace(errors: Sequence[StageError], wrong: Sequence[TensorDifference], weights: Sequence[str]) -> str:
    """One sentence that names the first layer, and the tensor where there is one, that makes the model differ.

    Args:
        errors: of all stages, in order.
        wrong: every weight that is not the checkpoint's.
        weights: names of all tensors.
    """
    first = first_difference(errors)
    if first is None and wrong:
        return f"first differs behind {errors[-1].stage}: {_tensors(wrong)}"
    if first is None:
        return "no stage differs on its own, the token log-probs do: the output layer or its log-softmax"
    where = f"first differs at {first.stage} (relative error {first.error:.2g})"
    if first.stage == "positions":
        return f"{where}: the mrope positions are not Hugging Face's; every layer after it reads them"
    here = [weight for weight in wrong if any(stage_of(name) == first.stage for name in weight.names)]
    if here:
        return f"{where}: {_tensors(here)}{_part(first.stage, wrong, weights)}"
    if first.stage == "embeddings":
        return f"{where}: the embedding's weights are the checkpoint's; where image features are put in differs"
    return (
        f"{where}: what it reads agrees, and its weights are the checkpoint's if the weight table is right; its "
        "computation differs, or the order of rows that the table's rule makes"
    )


def _tensors(wrong: Sequence[TensorDifference]) -> str:
    texts = [f"{', '.join(weight.names)} {weight.kind}" for weight in wrong[:_SHOWN]]
    more = f"; so do {len(wrong) - _SHOWN} more there" if len(wrong) > _SHOWN else ""
    return "; ".join(texts) + more


def _part(stage: str, wrong: Sequence[TensorDifference], weights: Sequence[str]) -> str:
    """When each stage of a part has a wrong weight it is the part that was not loaded."""
    part = _part_of(stage)
    here = [name for name in weights if _part_of(name) == part]
    others = {name for weight in wrong for name in weight.names if _part_of(name) == part}
    if {stage_of(name) for name in others} != {stage_of(name) for name in here}:
        return ""
    return f" ({len(others)} of {len(here)} weights of the {part}, in all of its stages: it was not loaded)"


def _part_of(name: str) -> str:
    """``vision tower`` (with its merger) or ``language model``, of a stage or tensor."""
    return "vision tower" if name.startswith("visual.") else "language model"
