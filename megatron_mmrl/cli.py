"""``mmrl``: read the command line and hand it to a file of ``commands``, whose heavy imports happen when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import megatron_mmrl

_DESCRIPTION = """\
Reinforcement learning with verifiable rewards for vision-language models,
on Megatron-core and SGLang.

  mmrl quickstart                         a tiny model learns to read digits
  mmrl train --config configs/quickstart.yaml optim.lr=1e-3
  mmrl eval --config configs/quickstart.yaml --checkpoint runs/quickstart/hf
"""
# Words on the command line -> file in commands/.
_COMMANDS = {
    "quickstart": "quickstart",
    "train": "train",
    "eval": "evaluate",
    "convert": "convert",
    "launch torchrun": "launch_torchrun",
    "launch slurm": "launch_slurm",
    "launch ray": "launch_ray",
    "plan": "plan",
    "data prepare": "data_prepare",
    "data check": "data_check",
    "doctor layout": "doctor_layout",
    "doctor parity": "doctor_parity",
    "doctor versions": "doctor_versions",
    "doctor cluster": "doctor_cluster",
}
_GROUPS = {
    "launch": "train over several nodes",
    "data": "turn data sets into the files that a run reads, and look at such files",
    "doctor": "check a layout or a checkpoint before trusting it",
}
_STYLE: Mapping[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 for a command line or configuration that cannot be used, 130 after Ctrl-C,
    143 after SIGTERM, 1 for a run that failed."""
    options = parse(sys.argv[1:] if argv is None else argv)
    from megatron_mmrl.config import ConfigError

    try:
        return int(options.run(options))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except options.expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted (SIGINT)", file=sys.stderr)
        return 130


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; ``key=value`` may stand anywhere. Exits with code 2 and a message if it cannot be read.

    The result has the command's options, ``run`` (the function to call with it), and where the command takes
    configuration keys ``overrides``, all of them in order.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    for argument in rest:
        if argument.startswith("-") or "=" not in argument or not hasattr(options, "overrides"):
            hint = f"; write {argument.lstrip('-')}" if argument.startswith("--") and "." in argument else ""
            options.parser.error(f"unrecognized argument {argument}{hint}")
    if hasattr(options, "overrides"):
        options.overrides = (*options.overrides, *rest)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmrl", description=_DESCRIPTION, **_STYLE)
    parser.add_argument("--version", action="version", version=f"mmrl {megatron_mmrl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    lists = {"": commands}
    for words, file in _COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in lists:
            parent = commands.add_parser(group, help=_GROUPS[group], description=_GROUPS[group], **_STYLE)
            lists[group] = parent.add_subparsers(dest="subcommand", required=True, metavar="what")
        module = importlib.import_module(f"megatron_mmrl.commands.{file}")
        _add(lists[group], name, module)
    return parser


def _add(commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, module: ModuleType) -> None:
    parser = commands.add_parser(name, help=module.SUMMARY, description=module.DESCRIPTION, **_STYLE)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run, parser=parser, expected=getattr(module, "EXPECTED", ()))


if __name__ == "__main__":
    sys.exit(main())
