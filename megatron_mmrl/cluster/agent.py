"""torchrun's agent of one node, which also writes down how a rank died that could not do so itself.

``python -m megatron_mmrl.cluster.agent`` takes torchrun's command line. torchrun reports a rank that was killed in its
own words on standard error, and to its caller as exit code 1; the launchers read records of failures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from megatron_mmrl.cluster.failure import FAILURE_DIR, record_death


def main(argv: Sequence[str]) -> int:
    """Run the ranks; 1 when one has failed."""
    try:
        run(parse_args(list(argv)))
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            record_death(Path(os.environ[FAILURE_DIR]), rank, failure.exitcode)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
