"""``mmrl launch torchrun``: one node's share of a run over several; to be started on every node."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from pathlib import Path

from megatron_mmrl.commands.launching import add_job, checked_job, planned

SUMMARY = "train over nodes with torchrun: start this on every node"
DESCRIPTION = """\
Starts this node's ranks with torchrun. Start it on every node, with --node
from 0 up; all nodes must see the same files. SIGUSR1 or SIGTERM saves at the
end of the step and ends with exit code 85: start it again with
run.resume=auto.

  mmrl launch torchrun --config F --nodes 2 --dry-run
  mmrl launch torchrun --config F --nodes 2 --node 0 --master-addr host0
  mmrl launch torchrun --config F --nodes 2 --node 1 --master-addr host0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--node", type=int, metavar="R", help="number of this node, from 0")
    parser.add_argument("--master-addr", metavar="A", help="name or address of node 0, as all nodes reach it")
    parser.add_argument("--log-dir", type=Path, metavar="D", help="for logs of the ranks; default: in run.output_dir")
    parser.add_argument(
        "--exit-file",
        type=Path,
        metavar="E",
        help="for schedulers that end all nodes at the first exit code but 0: write the code to E, which keeps the "
        "first, and exit with 0 for 85; a second request to stop changes nothing",
    )


def run(options: argparse.Namespace) -> int:
    """Start, or with --dry-run print. Raises ConfigError for what cannot work."""
    from megatron_mmrl.cluster.stop import EXIT_REQUEUE
    from megatron_mmrl.config import ConfigError

    try:
        code = _run(options)
    except ConfigError:
        _keep(2, options.exit_file)
        raise
    if code != 0:
        _keep(code, options.exit_file)
    return 0 if code == EXIT_REQUEUE and options.exit_file is not None else code


def _keep(code: int, file: Path | None) -> None:
    """Write down this node's exit code, unless another's is there."""
    if file is not None:
        with contextlib.suppress(FileExistsError), file.open("x") as out:
            out.write(str(code))


def _run(options: argparse.Namespace) -> int:
    from megatron_mmrl.cluster.describe import describe
    from megatron_mmrl.cluster.job import MODULE, shell_line
    from megatron_mmrl.cluster.torchrun import NodeShare, environment, run_node, torchrun_command
    from megatron_mmrl.config import ConfigError

    job = checked_job(options, joins=bool(options.node))
    shares = [
        NodeShare(
            topology=job.topology,
            node=node,
            master_addr=options.master_addr or "NODE0",
            master_port=job.config.cluster.master_port,
        )
        for node in range(job.topology.num_nodes)
    ]
    if options.dry_run:
        print(describe(job.config, planned(job)))
        for key, value in environment(shares[0], options.log_dir or job.log_dir(0)).items():
            print(f"# environment of every rank: {shlex.quote(f'{key}={value}')}")
        for share in shares:
            print(f"# on node {share.node}\n{shell_line(torchrun_command(share, MODULE, job.arguments()))}")
        return 0
    if options.node is None or options.master_addr is None:
        raise ConfigError("--node and --master-addr say which node this is and where node 0 is; or use --dry-run")
    if not 0 <= options.node < len(shares):
        raise ConfigError(f"--node {options.node} is not one of the {len(shares)} nodes, 0 to {len(shares) - 1}")
    log_dir = options.log_dir or job.log_dir(0)
    return run_node(shares[options.node], MODULE, job.arguments(), log_dir, stop_once=options.exit_file is None)
