"""In which order rows are visited: endless, seeded, resumable, and the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


class PromptStream:
    """Row numbers, epoch after epoch; the order of epoch e is a function of (seed, e) only.

    Args:
        num_rows: rows of the data set. Raises ValueError when there is none.
        fingerprint: of the data set; a saved position is refused by a stream over other data.
    """

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool, fingerprint: str) -> None:
        if num_rows < 1:
            raise ValueError("the data files have no rows")
        self._num_rows, self._seed, self._shuffle = num_rows, seed, shuffle
        self._fingerprint = fingerprint
        self._epoch, self._position = 0, 0
        self._order = self._epoch_order()

    @property
    def epoch(self) -> float:
        """Passes over the data so far, e.g. 1.5."""
        return self._epoch + self._position / self._num_rows

    def next(self, n: int) -> list[int]:
        """The next ``n`` row numbers, going on into the next epoch where this one ends."""
        rows: list[int] = []
        while len(rows) < n:
            if self._position == self._num_rows:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order()
            part = self._order[self._position : self._position + n - len(rows)]
            self._position += len(part)
            rows += part.tolist()
        return rows

    def state_dict(self) -> dict[str, int | bool | str]:
        """Position and what it is a position in, as JSON."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int | bool | str]) -> None:
        """Continue where ``state`` was taken. Raises ValueError when it belongs to other data or another order."""
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise ValueError(
                    f"the saved data position has {key}={state[key]!r}, this run has {mine!r}; "
                    "resume with the same data files and the same run.seed and data.shuffle"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._epoch_order()

    def _identity(self) -> dict[str, int | bool | str]:
        return {
            "num_rows": self._num_rows,
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def _epoch_order(self) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(self._num_rows)
        # numpy promises the raw words of a bit generator for ever, but not what Generator.permutation makes of them.
        words = np.random.Philox(key=[self._seed, self._epoch]).random_raw(self._num_rows)
        return np.argsort(words, kind="stable")
