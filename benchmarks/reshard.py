"""What a weight hand-over moves, and how long it takes, against what it cannot do without and against the usual way.

    python -m benchmarks.reshard [--bytes-only] [--models 7b 72b] [--rounds 5] [--device cuda] [--json FILE]

First an exact count of the bytes between ranks over pairs of layouts of the published models (``reshard_bytes.py``);
exit code 1 when any pair moves more than it must. Then the planner is timed on 512 ranks, and hand-overs of real layers
of 32B and 72B are timed on this machine's CPU (``reshard_speed.py``), and those to a real SGLang on the CPU or, with
``--device cuda``, on the GPU (``reshard_engine.py``).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import reshard_bytes, reshard_engine, reshard_speed


def main() -> int:
    """Print tables; 1 if any pair moves more than it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes-only", action="store_true", help="count, time nothing")
    parser.add_argument("--models", nargs="+", choices=reshard_bytes.MODELS, default=reshard_bytes.MODELS)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each hand-over; the median counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the real engine")
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args()
    pairs = [pair for name in options.models for pair in reshard_bytes.count(name)]
    reshard_bytes.print_table(pairs)
    result: dict[str, Any] = {"pairs": [asdict(pair) for pair in pairs]}
    if not options.bytes_only:
        result["planning"] = reshard_bytes.time_planning()
        print("72B, TP 8 x PP 8 x DP 8 -> 64 engines of 8, plan of one rank: {plan_s:.2f} s, {plan_mb:.2f} MB, "
              "{moves} moves".format(**result["planning"]))  # fmt: skip
        timed = [name for name in reshard_speed.MODELS if name in options.models]
        result["speed"] = [asdict(row) for row in reshard_speed.measure(timed, options.rounds)]
        result["engine"] = asdict(reshard_engine.measure(options.device, options.rounds))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    return int(any(pair.wire_bytes != pair.least_bytes for pair in pairs))


if __name__ == "__main__":
    sys.exit(main())
