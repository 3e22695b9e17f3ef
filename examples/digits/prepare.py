"""Make the digits task: data and a tiny random model.

``python examples/digits/prepare.py --out data/digits --task both``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_mmrl.data.digits import TASKS, DigitsOptions
from megatron_mmrl.quickstart import prepare


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write data and model to one directory."""
    defaults = DigitsOptions()
    parser = argparse.ArgumentParser(description="Write train.parquet, test.parquet and model/ for the digits task.")
    parser.add_argument("--out", type=Path, default=Path("data/digits"), help="directory to write to")
    parser.add_argument("--task", choices=TASKS, default=defaults.task)
    parser.add_argument("--train-rows", type=int, default=defaults.train_rows)
    parser.add_argument("--test-rows", type=int, default=defaults.test_rows)
    parser.add_argument(
        "--untagged-share",
        type=float,
        default=defaults.untagged_share,
        help="share of the written solutions whose answer has no tags (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="order and pairing of the scans")
    parser.add_argument("--model-seed", type=int, default=0, help="random weights of the model")
    given = parser.parse_args(arguments)
    options = DigitsOptions(
        task=given.task,
        train_rows=given.train_rows,
        test_rows=given.test_rows,
        untagged_share=given.untagged_share,
        seed=given.seed,
    )
    prepare(given.out, options, model_seed=given.model_seed)
    print(f"wrote {given.out}/train.parquet, {given.out}/test.parquet and {given.out}/model")


if __name__ == "__main__":
    main()
