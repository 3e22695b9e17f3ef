"""What is written for users holds: every configuration loads and every command line in the documentation parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_mmrl import cli
from megatron_mmrl.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set((ROOT / "configs" / "models").iterdir()))
PAGES = [
    page
    for page in (
        ROOT / "README.md",
        *sorted((ROOT / "examples").rglob("README.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if page.is_file()
]


def commands(page: Path) -> list[str]:
    """Lines of the page's shell blocks, continued lines joined, comments and prompts dropped."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def check_command(words: list[str]) -> None:
    """Refuse a command of ours that would not run; other people's commands are not looked at."""
    while words and "=" in words[0]:  # VARIABLE=value command
        words = words[1:]
    program = words[0].removeprefix(".venv/bin/") if words else ""
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"the Makefile has no target {target}"
    elif program == "mmrl" and not {"--help", "--version"} & set(words):
        check_config(words[1:])
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        if module.startswith("megatron_mmrl"):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"there is no module {module}"
        if module in ("megatron_mmrl.train", "megatron_mmrl.evaluate"):
            command = "train" if module.endswith("train") else "eval"
            check_config([command, *words[words.index("-m") + 2 :]])
    elif program.startswith("python") and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"there is no file {words[1]}"


def check_config(argv: list[str]) -> None:
    request = cli.parse(argv)
    if not hasattr(request, "config"):
        return
    if request.config.suffix == ".yaml" and (ROOT / request.config).is_file():
        load_config(ROOT / request.config, request.overrides)
    else:
        assert request.config.parts[0] == "runs", f"{request.config} is neither in the repository nor made by a run"


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(ROOT)) for path in CONFIGS])
def test_every_configuration_loads(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_command_in_the_documentation_parses(page: Path) -> None:
    for command in commands(page):
        for part in re.split(r"\s*(?:&&|;|\|)\s*", command):
            check_command(shlex.split(part, comments=True))


@pytest.mark.parametrize(
    "command",
    [
        "make quikstart",
        "mmrl train --config configs/none.yaml",
        "mmrl train --config configs/quickstart.yaml run.sed=1",
        "torchrun --nproc-per-node 2 -m megatron_mmrl.trian --config configs/quickstart.yaml",
        "OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m megatron_mmrl.train --config configs/quickstart.yaml x=1",
        "python examples/none.py",
    ],
)
def test_a_command_that_would_not_run_is_noticed(command: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_command(shlex.split(command))


def test_no_page_names_a_machine_of_ours() -> None:
    assert PAGES
    for page in PAGES:
        assert str(ROOT) not in page.read_text(encoding="utf-8"), page
