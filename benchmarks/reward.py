r"""The reward pool against math-verify called for one response after the other: equal verdicts, and how many a second.

    python -m benchmarks.reward [--responses 800] [--workers 2] [--repeats 3] [--json FILE]

``distinct``: every answer is another expression, so that neither a fast path nor a cache helps; what is measured is how
well the work is spread. ``groups``: groups of 8 as a policy writes them, where many answers are the gold answer to the
letter and wrong ones come more than once; fast path and cache count. Both ways run in turn in one process, and the best
time of each counts. On a machine that is busy with other things the seconds on the clock say little; ``cpu`` compares
processor time instead: how much faster the pool would be if each of its workers had a core of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_mmrl.config.reward import RewardConfig, RewardTerm
from megatron_mmrl.rewards.pool import RewardPool
from megatron_mmrl.types import EncodedPrompt, Group, Prompt, Response

GROUP = 8
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Best times of one workload, in seconds of the clock and of the processors."""

    name: str
    responses: int
    serial_s: float
    pool_s: float
    serial_cpu_s: float
    pool_cpu_s: float  # of the workers and of this process
    workers: int
    equal: bool  # all verdicts

    @property
    def speedup(self) -> float:
        return self.serial_s / self.pool_s

    @property
    def cpu_speedup(self) -> float:
        return self.workers * self.serial_cpu_s / self.pool_cpu_s


Pairs = Sequence[tuple[str, list[str]]]  # (gold, answers of its group)


def distinct(responses: int, repeat: int) -> Pairs:
    """Every gold and answer is different, also from those of other repeats."""
    draw = random.Random(repeat)
    pairs = []
    for index in range(responses):
        a, b = draw.randint(2, 99), repeat * responses + index + 2
        right = draw.choice([f"\\frac{{{a}\\pi}}{{{b}}}", f"\\pi \\cdot {a} \\cdot {b}^{{-1}}", f"{a}\\pi/{b}"])
        pairs.append((f"\\frac{{{a}}}{{{b}}}\\pi", [right if index % 2 else f"\\frac{{{a + 1}}}{{{b}}}\\pi"]))
    return pairs


def groups(responses: int, repeat: int) -> Pairs:
    """Eight answers to each gold answer, six in ten of which are numbers, the others fractions, surds and letters.

    Half of the answers are the gold answer to the letter, one says it otherwise, three are wrong, two of them equal.
    """
    draw = random.Random(repeat)
    made = []
    for index in range(responses // GROUP):
        a, b = draw.randint(2, 40), repeat * responses + index + 2
        count, frac, surd = f"{a * b}", f"\\frac{{{a}}}{{{b}}}", f"{a}\\sqrt{{{b}}}"
        kinds = [(count, f"{count}.0", f"{a * b + 1}", f"{b}")] * 4
        kinds += [(f"{a}.5", f"\\frac{{{2 * a + 1}}}{{2}}", f"{a}.25", f"{a}")] * 2
        kinds += [(frac, f"{a}/{b}", f"\\frac{{{b}}}{{{a}}}", f"{b}")] * 2
        kinds += [(surd, f"\\sqrt{{{a * a * b}}}", f"{a + 1}\\sqrt{{{b}}}", f"{a}")]
        kinds += [("B", "(B)", "C", "A")]
        gold, other, wrong, another = draw.choice(kinds)
        made.append((gold, draw.sample([gold] * 4 + [other, wrong, wrong, another], GROUP)))
    return made


def as_groups(pairs: Pairs, salt: str) -> list[Group]:
    """Groups whose responses all differ, as sampled ones do, from those with another ``salt`` too."""
    empty = np.zeros(0, dtype=np.int64)
    made = []
    for number, (gold, answers) in enumerate(pairs):
        prompt = Prompt(id=f"{salt}:{number}", source="benchmark", messages=(), images=(), answer=gold)
        encoded = EncodedPrompt(
            prompt=prompt,
            ids=empty,
            engine_ids=empty,
            images=(),
            pixel_values=np.zeros((0, 1176), np.float32),
            image_grid_thw=np.zeros((0, 3), np.int64),
        )
        thought = "First the figure, then the lengths, then what follows from them. " * 20
        texts = [f"<think>{salt} {n} {thought}</think><answer>{answer}</answer>" for n, answer in enumerate(answers)]
        responses = tuple(
            Response(ids=empty, logprobs=empty.astype(np.float32), finish="stop", policy_version=0, text=text)
            for text in texts
        )
        made.append(Group(prompt=encoded, responses=responses))
    return made


def serial(pairs: Pairs) -> list[bool]:
    """math-verify on every response by itself."""
    from math_verify import parse, verify

    return [
        verify(
            parse(f"${gold}$", parsing_timeout=None), parse(f"${answer}$", parsing_timeout=None), timeout_seconds=None
        )
        for gold, answers in pairs
        for answer in answers
    ]


def measure(name: str, make: Callable[[int, int], Pairs], options: argparse.Namespace) -> Result:
    """Run both in turn on the same answers, others in each repeat."""
    clocks: dict[str, list[tuple[float, float]]] = {"serial": [], "pool": []}
    equal = True
    config = RewardConfig(terms=[RewardTerm(name="accuracy")], num_workers=options.workers, timeout_s=60.0)
    with RewardPool(config) as pool:
        for repeat in range(options.repeats):
            pairs = make(options.responses, repeat)
            work = as_groups(pairs, f"{name}{repeat}")
            truth, *times = timed([], serial, pairs)
            clocks["serial"].append((times[0], times[1]))
            scored, *times = timed(pool.worker_pids, pool.score, work)
            clocks["pool"].append((times[0], times[1]))
            equal &= truth == [score.total == 1.0 for group in scored for score in group.scores or ()]
    best = {way: [min(values) for values in zip(*both, strict=True)] for way, both in clocks.items()}
    return Result(
        name=name,
        responses=options.responses,
        serial_s=best["serial"][0],
        pool_s=best["pool"][0],
        serial_cpu_s=best["serial"][1],
        pool_cpu_s=best["pool"][1],
        workers=options.workers,
        equal=equal,
    )


def timed(pids: Sequence[int], work: Callable[..., list], *arguments: object) -> tuple[list, float, float]:
    """What ``work`` gives, seconds on the clock, and processor seconds of this process and of ``pids``."""
    start, cpu = time.perf_counter(), time.process_time() + sum(map(cpu_seconds, pids))
    result = work(*arguments)
    return result, time.perf_counter() - start, time.process_time() + sum(map(cpu_seconds, pids)) - cpu


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far; its clock ticks every 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def main() -> None:
    """Print a table, and write it where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=800)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off
    serial(groups(GROUP, 0))  # builds math-verify's grammars
    print(f"{'':10}{'serial/s':>10}{'pool/s':>10}{'faster':>8}{'cpu':>8}  verdicts")
    results = []
    for name, make in (("distinct", distinct), ("groups", groups)):
        result = measure(name, make, options)
        results.append(asdict(result) | {"speedup": result.speedup, "cpu_speedup": result.cpu_speedup})
        rates = [result.responses / seconds for seconds in (result.serial_s, result.pool_s)]
        same = "equal" if result.equal else "DIFFERENT"
        print(f"{name:10}{rates[0]:10.0f}{rates[1]:10.0f}{result.speedup:8.2f}{result.cpu_speedup:8.2f}  {same}")
    if options.json:
        machine = {"processor": platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
