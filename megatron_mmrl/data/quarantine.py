"""Bad rows are written down, counted, and tolerated up to a limit."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_mmrl.data.errors import TooManyBadRowsError

BadRows = dict[tuple[str, int], str]


class Quarantine:
    """The bad rows of one data set.

    Args:
        path: ``quarantine.jsonl``, appended to, one ``{file, row, reason}`` a line; None on ranks that only count.
            Rows that it already lists (from before a resume, from another reader of the file) are not listed again.
        max_bad_fraction: share of ``total_rows`` that may be bad.
        total_rows: rows of the data set, good and bad.
    """

    def __init__(self, path: Path | None, *, max_bad_fraction: float, total_rows: int) -> None:
        self._path = path
        self._fraction, self._total = max_bad_fraction, total_rows
        # The sum guards against 0.29 * 100 = 28.999999999999996.
        self._limit = math.floor(max_bad_fraction * total_rows + 1e-9)
        self._bad: BadRows = {}
        self._listed: set[tuple[str, int]] = set()
        self._listed_size = 0  # of the quarantine file, when it was last read or written here

    @property
    def count(self) -> int:
        """Different bad rows met so far."""
        return len(self._bad)

    def add(self, file: str, row: int, reason: str) -> None:
        """Count a row once and list it once."""
        self._bad.setdefault((file, row), reason)
        if self._path is not None:
            self._list(self._path, file, row, reason)

    def check(self) -> None:
        """Raise TooManyBadRowsError, with the count and the first bad row, when the limit is exceeded."""
        if self.count <= self._limit:
            return
        (file, row), reason = next(iter(self._bad.items()))
        raise TooManyBadRowsError(
            f"{self.count} of {self._total} rows are bad, more than the {self._limit} that "
            f"data.max_bad_fraction={self._fraction} allows; the first is {file} row {row}: {reason}"
        )

    def state_dict(self) -> list[list[str | int]]:
        """The bad rows so far, as JSON."""
        return [[file, row, reason] for (file, row), reason in self._bad.items()]

    def load_state_dict(self, state: list[list[str | int]]) -> None:
        self._bad = {(str(file), int(row)): str(reason) for file, row, reason in state}

    def _list(self, path: Path, file: str, row: int, reason: str) -> None:
        if path.exists() and path.stat().st_size != self._listed_size:
            self._listed = _read_listed(path)
        if (file, row) in self._listed:
            return
        self._listed.add((file, row))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"file": file, "row": row, "reason": reason}) + "\n")
        self._listed_size = path.stat().st_size


def _read_listed(path: Path) -> set[tuple[str, int]]:
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):  # a crash cut the last line off: drop it, so that the next one is whole
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return {(entry["file"], entry["row"]) for entry in map(json.loads, text.splitlines())}
