"""Evaluate: ``torchrun --nproc-per-node N -m megatron_mmrl.evaluate --config F --checkpoint D [key=value ...]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl import pulse
from megatron_mmrl.checkpoint.manifest import STATE_FILE
from megatron_mmrl.checkpoint.output_dir import LOG_DIR
from megatron_mmrl.cluster.failure import run_rank
from megatron_mmrl.commands.evaluate import add_arguments, checked
from megatron_mmrl.config import Config, ConfigError
from megatron_mmrl.metrics.evaluation import AnswersFile, columns_of_none, print_table
from megatron_mmrl.metrics.pass_at_k import Row, Tally, as_json, default_ks, pass_at_1, report
from megatron_mmrl.metrics.progress import Progress

if TYPE_CHECKING:
    from megatron_mmrl.build import Machinery
    from megatron_mmrl.data.source import PromptSource
    from megatron_mmrl.types import Group, Prompt

_RIGHT = 0.5  # a term above it says that an answer is right: accuracy's 1, boxed's 1 (of -1, 0, 1)
_CORRECTNESS = ("benchmark", "accuracy", "boxed")  # which term says so, unless --correct names one
_SOURCE = "data_source"


def main(argv: Sequence[str] | None = None) -> int:
    """One rank of an evaluation; rank 0 prints a table, and as its last line the result as JSON."""
    parser = argparse.ArgumentParser(prog="megatron_mmrl.evaluate", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(argv)
    config = checked(options)
    term = correctness_term([each.key for each in config.reward.terms], options.correct)
    run(config, options, term)
    return 0


def run(config: Config, options: argparse.Namespace, term: str) -> None:
    """Load the checkpoint's weights into the policy, hand them to the engine, answer and score."""
    from megatron_mmrl.build import machinery

    scratch = Path(config.run.output_dir) / LOG_DIR / "eval"
    with machinery(config, scratch) as machine:
        _load(machine, options.checkpoint)
        source = machine.prompts(config.data.eval_files, scratch / "quarantine.jsonl")
        machine.handover.publish(0)
        tallies, means = _answers(machine, source, options, term)
        if machine.exchange.rank != 0:
            return
        rows = report(tallies, options.pass_k or default_ks(options.samples), (_SOURCE, *options.by))
        result: dict[str, object] = {
            "checkpoint": str(options.checkpoint),
            "prompts": len(tallies),
            "left_out": {name: refusal.reason for name, refusal in source.refused.items()},
            "samples": options.samples,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "max_response_tokens": config.rollout.max_response_tokens,
            "repetition_penalty": config.rollout.repetition_penalty,
            "correct": term,
            **means,
            "results": as_json(rows),
        }
        _show(result, f"{options.checkpoint}: {term}, percent ± standard error", rows)
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def correctness_term(names: Sequence[str], wanted: str | None) -> str:
    """The reward term that says whether an answer is right. Raises ConfigError when there is none of that name."""
    candidates = (wanted,) if wanted else _CORRECTNESS
    for name in candidates:
        if name in names:
            return name
    raise ConfigError(f"none of reward.terms ({', '.join(names)}) is {' or '.join(candidates)}; use --correct TERM")


def groups_of(prompt: Prompt, by: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Column -> what the prompt is counted under there; a dot leads into an object, a list stands for its items."""
    return {_SOURCE: (prompt.source,), **{column: _values(prompt.meta, column) for column in by}}


def _values(meta: Mapping[str, object], column: str) -> tuple[str, ...]:
    value: object = meta.get(column)
    if value is None:
        value = meta
        for name in column.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(str(item) for item in items if item is not None)


@pulse.phase("answer")
def _answers(
    machine: Machinery, source: PromptSource, options: argparse.Namespace, term: str
) -> tuple[list[Tally], dict[str, float]]:
    """Every question's tally, and means over all answers, equal on every rank; rank 0 shows and writes."""
    from megatron_mmrl.controller.evaluate import answered, score_means

    config = machine.config
    sampling = replace(
        machine.sampling,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        num_samples=options.samples,
    )
    limit = config.run.max_eval_prompts
    at_once = max(1, config.rollout.num_engines * config.rollout.max_running_requests // options.samples)
    chunks = answered(
        source.chunks(at_once, limit), machine.fleet, machine.scorer, machine.handover, sampling=sampling,
        seed=config.run.seed,
    )  # fmt: skip
    tallies: list[Tally] = []
    sums: dict[str, float] = {}
    first = machine.exchange.rank == 0
    with ExitStack() as stack:
        file = stack.enter_context(AnswersFile(options.output)) if first and options.output else None
        total = min(source.num_prompts, limit or source.num_prompts)
        progress = Progress(total, what="question") if first else None
        for groups in chunks:
            tallies += [_tally(group, term, options.by, file) for group in groups]
            for name, value in score_means(groups).items():
                sums[name] = sums.get(name, 0.0) + len(groups) * value
            if progress is not None:
                right = sum(pass_at_1(tally.num_samples, tally.num_correct) for tally in tallies) / len(tallies)
                progress.show({"step": float(len(tallies)), "eval/accuracy": right})
        if progress is not None:
            progress.close()
    if not tallies:
        raise ValueError(f"none of the {source.num_prompts} questions can be used")
    return tallies, {name: value / len(tallies) for name, value in sums.items()} | machine.scorer.counters()


def _tally(group: Group, term: str, by: Sequence[str], file: AnswersFile | None) -> Tally:
    correct = [score.terms[term] > _RIGHT for score in group.scores or ()]
    columns = groups_of(group.prompt.prompt, by)
    if file is not None:
        file.write(group, correct, columns)
    return Tally(num_samples=len(correct), num_correct=sum(correct), columns=columns)


def _show(result: Mapping[str, object], title: str, rows: Sequence[Row]) -> None:
    left_out = result["left_out"]
    if left_out:
        name, reason = next(iter(left_out.items()))
        print(f"{len(left_out)} questions were left out; the first is {name}: {reason}")
    print_table(title, rows, sys.stdout)
    for column in columns_of_none(rows):
        print(f"--by {column}: no question has this column; docs/evaluation.md names those of the evaluation sets")
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _load(machine: Machinery, checkpoint: Path) -> None:
    from megatron_mmrl.checkpoint.state import load_weights
    from megatron_mmrl.models.registry import load_checkpoint, open_checkpoint

    chunks = machine.policy.chunks
    if (checkpoint / STATE_FILE).is_file():
        load_weights(checkpoint, chunks)
    else:
        load_checkpoint([chunk.module for chunk in chunks], open_checkpoint(checkpoint))


if __name__ == "__main__":
    run_rank(main)
