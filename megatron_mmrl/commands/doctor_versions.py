"""``mmrl doctor versions``: what is installed here, as the last line of the image's build and of a bug report."""

from __future__ import annotations

import argparse
import json

SUMMARY = "versions of what has to go together"
DESCRIPTION = """\
Prints the versions of this package, of what it runs on and of the libraries
that are used where they are installed (Transformer Engine, apex), then CUDA
and the devices that torch finds.

  mmrl doctor versions
  mmrl doctor versions --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from megatron_mmrl.doctor.versions import as_text, device_versions, installed_versions

    versions = installed_versions() | device_versions()
    print(json.dumps(versions, indent=2) if options.json else as_text(versions).rstrip())
    return 0
