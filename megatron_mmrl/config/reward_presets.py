"""The rewards of known recipes as terms: what ``reward.preset`` stands for.

Each entry gives (name, weight, kwargs) of its terms, first in the corrected form, then as the original computed it
(``reward.legacy: true``), or None where the original has nothing to bring back. ``docs/rewards.md`` says what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Terms = Sequence[tuple[str, float, Mapping[str, Any]]]

# Text may stand around the two blocks, and they may not be empty; without an answer block the text itself is read.
_EUREKA_FORMAT = {"strict": False, "allow_empty": False}
_EUREKA_ACCURACY = {"extract": ["answer", "text"]}
_GEMMA_TAGS = ["REASONING", "SOLUTION"]

PRESETS: Mapping[str, tuple[Terms, Terms | None]] = {
    "siirl": (
        [("accuracy", 0.9, _EUREKA_ACCURACY), ("format", 0.1, _EUREKA_FORMAT)],
        [("accuracy", 0.9, {"legacy": "siirl"}), ("format", 0.1, {"legacy": "siirl"})],
    ),
    "mm_eureka": (
        [("accuracy", 1.0, _EUREKA_ACCURACY), ("format", 0.5, _EUREKA_FORMAT)],
        [("accuracy", 1.0, {"legacy": "mm_eureka"}), ("format", 1.0, {"legacy": "mm_eureka"})],  # it returns 0.5 itself
    ),
    "verl_boxed": ([("boxed", 1.0, {})], None),
    "swift_r1v": (
        [("accuracy", 1.0, {"extract": ["answer", "text"], "string": True}), ("format", 1.0, {})],
        [("accuracy", 1.0, {"legacy": "swift_r1v"}), ("format", 1.0, {"legacy": "swift_r1v"})],
    ),
    "gemma_math": (
        [
            ("format", 1.0, {"tags": _GEMMA_TAGS, "per_block": True}),
            ("accuracy", 2.0, {"extract": "SOLUTION", "only_block": True, "string": True}),
        ],
        [("format", 1.0, {"legacy": "gemma_math"}), ("accuracy", 2.0, {"legacy": "gemma_math"})],
    ),
}
DEFAULT_TERMS: Terms = [("accuracy", 0.9, {}), ("format", 0.1, {})]
