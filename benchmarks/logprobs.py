"""Log-probs and entropy without the logits, against a trainer that makes all of them: time and extra memory.

    python -m benchmarks.logprobs [--hidden 256 1024 3584] [--shares 1 0.5 0.25] [--repeats 3] [--json FILE]

The plain way takes logits, log_softmax, gather and entropy of every token of the pack, and autograd's backward to the
hidden states and the output layer; ours takes the response tokens, which are a share of the pack. Both run in turn in
one process, and the best time of each counts: seconds on the clock, and seconds of processor time, which suffer less
from other work on the machine. Extra memory is the peak over a pass beyond its inputs and its results, from the
kernel's own account of a fresh process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatron_mmrl.trainer.logprobs import token_logprobs

PASSES = ("forward", "train", "train+entropy")  # no gradient; of the log-probs; of log-probs and entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One pack on a random output layer."""

    hidden: int
    vocab: int
    tokens: int
    share: float  # of the tokens, at its end, that are response tokens
    kind: str  # of PASSES
    chunk_tokens: int

    @property
    def response_tokens(self) -> int:
        return round(self.tokens * self.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Inputs, and what the loss multiplies log-probs and entropies with."""

    case: Case
    hidden: Tensor  # f32[tokens, H]
    weight: Tensor  # f32[V, H], logits have standard deviation 1
    targets: Tensor  # i64[tokens]
    upstream: Tensor  # f32[2, tokens], 0 outside the response


def make_problem(case: Case) -> Problem:
    """The same numbers for the same sizes."""
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(2, case.tokens, generator=generator)
    upstream[:, : case.tokens - case.response_tokens] = 0
    return Problem(
        case=case,
        hidden=torch.randn(case.tokens, case.hidden, generator=generator),
        weight=torch.randn(case.vocab, case.hidden, generator=generator).mul_(case.hidden**-0.5),
        targets=torch.randint(case.vocab, (case.tokens,), generator=generator),
        upstream=upstream,
    )


def materialised(problem: Problem) -> list[Tensor]:
    """Log-probs and entropies of all tokens, [tokens], then the gradients of hidden and weight where asked for."""

    def values(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(hidden @ weight.t(), dim=-1)
        with torch.set_grad_enabled(problem.case.kind == "train+entropy"):
            entropy = -(logp.exp() * logp).sum(dim=-1)
        return logp.gather(1, problem.targets[:, None]).squeeze(1), entropy

    return _run(problem, problem.hidden, problem.upstream, values)


def chunked(problem: Problem) -> list[Tensor]:
    """The same of the response tokens only."""
    case = problem.case
    rows = slice(case.tokens - case.response_tokens, None)

    def values(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(
            hidden,
            weight,
            problem.targets[rows],
            vocab_start=0,
            temperature=1.0,
            banned=None,
            vocab_size=case.vocab,
            group=None,
            chunk_tokens=case.chunk_tokens,
        )

    return _run(problem, problem.hidden[rows], problem.upstream[:, rows], values)


METHODS = {"materialised": materialised, "chunked": chunked}


def _run(
    problem: Problem, hidden: Tensor, upstream: Tensor, values: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> list[Tensor]:
    kind = problem.case.kind
    hidden = hidden.detach().requires_grad_(kind != "forward")
    weight = problem.weight.detach().requires_grad_(kind != "forward")
    logprobs, entropy = values(hidden, weight)
    results = [logprobs.detach(), entropy.detach()]
    if kind == "forward":
        return results
    loss = (logprobs * upstream[0]).sum()
    if kind == "train+entropy":
        loss = loss + (entropy * upstream[1]).sum()
    loss.backward()
    return [*results, *(given.grad for given in (hidden, weight) if given.grad is not None)]


def extra_bytes(case: Case, method: str) -> int:
    """Peak memory of a fresh process over one pass, beyond its inputs and its results. Linux only."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_extra_bytes_here, case, method).result()


def _extra_bytes_here(case: Case, method: str) -> int:
    warm_up = Case(hidden=8, vocab=64, tokens=16, share=1, kind=case.kind, chunk_tokens=16)
    METHODS[method](make_problem(warm_up))  # libraries loaded, threads started
    problem = make_problem(case)
    ctypes.CDLL(None).malloc_trim(0)  # what is free but still counted would hide as much of the pass
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _peak_bytes()
    results = METHODS[method](problem)
    return _peak_bytes() - before - sum(result.nbytes for result in results)


def _peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The least of each over the repeats."""

    wall_s: float
    cpu_s: float


def costs(problems: dict[str, tuple[str, Problem]], repeats: int) -> dict[str, Cost]:
    """Of each named (method, problem), taken in turn so that a busy moment of the machine meets all of them."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in problems}
    for _ in range(repeats):
        for name, (method, problem) in problems.items():
            start = time.perf_counter(), time.process_time()
            METHODS[method](problem)
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: Cost(wall_s=min(w for w, _ in took), cpu_s=min(c for _, c in took)) for name, took in seconds.items()}


def compare(case: Case, shares: list[float], repeats: int) -> list[dict[str, object]]:
    """A row per share: both costs, their ratios, and the memory of each in bytes."""
    ours = {share: Case(**(asdict(case) | {"share": share})) for share in shares}
    memory = {share: extra_bytes(one, "chunked") for share, one in ours.items()}
    plain_bytes = extra_bytes(case, "materialised")
    problems = {"plain": ("materialised", make_problem(case))}
    found = costs(problems | {str(share): ("chunked", make_problem(one)) for share, one in ours.items()}, repeats)
    plain = found.pop("plain")
    return [
        {
            "case": asdict(one),
            "materialised": asdict(plain) | {"extra_bytes": plain_bytes},
            "chunked": asdict(found[str(share)]) | {"extra_bytes": memory[share]},
            "time_ratio": found[str(share)].wall_s / plain.wall_s,
            "cpu_time_ratio": found[str(share)].cpu_s / plain.cpu_s,
            "less_than_materialised": plain_bytes / memory[share],
            "less_than_logits": case.tokens * case.vocab * 4 / memory[share],
        }
        for share, one in ours.items()
    ]


def _print(row: dict) -> None:
    case, plain, ours = row["case"], row["materialised"], row["chunked"]
    print(
        f"{case['hidden']:>6}  {case['kind']:<14}{case['share']:>7.0%}"
        f"{plain['wall_s']:>9.2f}{ours['wall_s']:>9.2f}{row['time_ratio']:>7.2f}{row['cpu_time_ratio']:>7.2f}"
        f"{plain['extra_bytes'] / 2**20:>9.0f}{ours['extra_bytes'] / 2**20:>9.1f}"
        f"{row['less_than_materialised']:>7.0f}x{row['less_than_logits']:>7.0f}x",
        flush=True,
    )


def main() -> None:
    """Measure, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024, 3584])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    options = parser.parse_args()
    print(f"{platform.machine()}, {psutil.cpu_count()} cores, {torch.get_num_threads()} threads, float32")
    print(f"V = {options.vocab}, {options.tokens} tokens, best of {options.repeats}; plain: all tokens materialised\n")
    print("hidden  pass          response  plain s   ours s  ratio    cpu   MiB    MiB   less  than logits")
    rows = []
    for hidden in options.hidden:
        for kind in options.passes:
            case = Case(
                hidden=hidden,
                vocab=options.vocab,
                tokens=options.tokens,
                share=1.0,
                kind=kind,
                chunk_tokens=options.chunk_tokens,
            )
            rows += (found := compare(case, options.shares, options.repeats))
            for row in found:
                _print(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
