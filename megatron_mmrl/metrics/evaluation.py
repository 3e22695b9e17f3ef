"""What an evaluation shows and keeps: a table for people, one line of JSON for each answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from megatron_mmrl.metrics.pass_at_k import NO_VALUE, Estimate, Row
from megatron_mmrl.types import Group

_WIDTH = 120  # of a table that does not go to a terminal


def print_table(title: str, rows: Sequence[Row], stream: TextIO) -> None:
    """Percentages with their standard errors, one line per row, a rule between columns' groups; below the title."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("group", overflow="fold")
    table.add_column("questions", justify="right")
    for name in rows[0].scores:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        name = f"{row.column}: {row.value}" if row.value else row.column
        scores = [as_percent(each) for each in row.scores.values()]
        last_of_column = index + 1 < len(rows) and rows[index + 1].column != row.column
        table.add_row(escape(name), str(row.num_prompts), *scores, end_section=last_of_column)
    console = Console(file=stream, width=None if stream.isatty() else _WIDTH, highlight=False)
    console.print(escape(title), soft_wrap=True)  # a title of the table's own would be cut to the table's width
    console.print(table)


def columns_of_none(rows: Sequence[Row]) -> list[str]:
    """Columns of a report that no question has: misspelt, or of another data set."""
    values: dict[str, set[str]] = {}
    for row in rows:
        values.setdefault(row.column, set()).add(row.value)
    return [column for column, found in values.items() if found == {NO_VALUE}]


def as_percent(score: Estimate) -> str:
    """``62.50 ± 3.10``, in percent; without an error when there is one question only."""
    error = "" if math.isnan(score.error) else f" ± {100 * score.error:.2f}"
    return f"{100 * score.mean:.2f}{error}"


class AnswersFile:
    """Writes ``{prompt_id, data_source, sample, question, text, answer, correct, ...}``; appears under its name when it
    is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._draft = path, path.with_name(f".{path.name}.draft")
        self._file = self._draft.open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._draft.replace(self._path)
        else:
            self._draft.unlink()

    def write(self, group: Group, correct: Sequence[bool], columns: Mapping[str, Sequence[str]]) -> None:
        """One line for each response of a scored group."""
        prompt = group.prompt.prompt
        question = next((turn.text for turn in reversed(prompt.messages) if turn.role == "user"), "")
        for index, (response, score) in enumerate(zip(group.responses, group.scores or (), strict=True)):
            record = {
                "prompt_id": prompt.id,
                "data_source": prompt.source,
                **{name: list(values) for name, values in columns.items() if name != "data_source"},
                "sample": index,
                "question": question,
                "text": response.text,
                "answer": prompt.answer,
                "correct": correct[index],
                "terms": dict(score.terms),
                "error": score.error,
                "length": len(response.ids),
                "finish": response.finish,
            }
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
