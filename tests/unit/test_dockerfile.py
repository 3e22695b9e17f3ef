"""The image, as far as it can be judged without building it: pinned, without secrets, not root, versions that agree."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PACKAGE = re.compile(r"^(?P<name>[a-z0-9.-]+)==(?P<version>[^ ;\[]+) --hash=sha256:[0-9a-f]{64}$")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    keyword: str
    text: str


def parse(dockerfile: str) -> list[Instruction]:
    """Instructions in order, continued lines joined, comments dropped."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    words = [line.split(maxsplit=1) for line in joined.splitlines()]
    return [Instruction(keyword=keyword, text=" ".join(text.split())) for keyword, text in words]


def problems(dockerfile: str) -> list[str]:
    """Everything that is not pinned, not safe, or not in an order that lets layers be kept."""
    instructions = parse(dockerfile)
    found = [
        f"{instruction.keyword} {command}: {problem}"
        for instruction in instructions
        for command in re.split(r" && | \|\| | ; ", instruction.text)
        for problem in command_problems(instruction.keyword, command)
    ]
    last = {instruction.keyword: instruction.text for instruction in instructions}
    if last.get("USER", "root").partition(":")[0] in ("root", "0"):
        found.append("runs as root")
    if last.get("ENTRYPOINT") != '["mmrl"]':
        found.append("the entry point is not mmrl")
    copies = [n for n, instruction in enumerate(instructions) if instruction == Instruction(keyword="COPY", text=". .")]
    locks = [n for n, instruction in enumerate(instructions) if "-r requirements/" in instruction.text]
    if not copies or not locks or max(locks) > min(copies):
        found.append("sources are copied before packages are installed")
    return found


def command_problems(keyword: str, command: str) -> list[str]:
    words = command.split()
    found = []
    if keyword == "FROM" and not re.search(r":[^@]*\d[^@]*@sha256:[0-9a-f]{64}$", words[0]):
        found.append("needs a tag and a digest")
    if keyword == "ADD":
        found.append("COPY does not fetch or unpack")
    if keyword in ("ARG", "ENV") and re.search(r"(?i)(token|secret|password|api_?key)", command):
        found.append("a secret would stay in the image")
    if keyword != "RUN":
        return found
    if "pip install" in command and "--no-deps" not in words:
        found.append("pip chooses versions by itself")
    if "pip install" in command and "-r" in words and "--require-hashes" not in words:
        found.append("no checksums are demanded")
    if "pip install" in command and re.search(r"[a-z]==\d", command):
        found.append("a version besides those in requirements/")
    if re.search(r"\b(curl|wget)\b|git clone", command):
        found.append("fetches something without a checksum")
    return found


def requirement_lines(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "--"))]


def versions(name: str) -> dict[str, str]:
    """Of a file of ``name==version`` lines, checksums or not."""
    pairs = (line.partition(" ")[0].split("==") for line in requirement_lines(name))
    return {re.sub(r"\[.*", "", package).replace("_", "-").lower(): version for package, version in pairs}


def argument(name: str) -> str:
    (value,) = (i.text.partition("=")[2] for i in parse(DOCKERFILE) if i.keyword == "ARG" and i.text.startswith(name))
    return value.strip('"')


def test_the_dockerfile_has_no_problem() -> None:
    assert problems(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("@sha256:", "#", "needs a tag and a digest"),
        ("13.0.2-cudnn-devel-ubuntu24.04@", "latest@", "needs a tag and a digest"),
        (" --require-hashes -r requirements/cuda-lock.txt", " -r requirements/cuda-lock.txt", "no checksums"),
        ("pip install --no-deps --require-hashes -r requirements/cuda-lock", "pip install -r requirements/cuda-lock",
         "pip chooses versions"),
        ("USER 10001:10001", "USER root", "runs as root"),
        ("USER 10001:10001\n", "", "runs as root"),
        ("git -C /tmp/apex checkout", "curl x | sh && git -C /tmp/apex checkout", "without a checksum"),
        ("ARG MAX_JOBS=8", "ARG HF_TOKEN=x", "a secret would stay"),
        ("COPY requirements/cuda-lock.txt requirements/", "COPY . .", "sources are copied before"),
        ('ENTRYPOINT ["mmrl"]', 'ENTRYPOINT ["bash"]', "entry point"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_noticed(old: str, new: str, problem: str) -> None:
    assert old in DOCKERFILE
    assert any(problem in found for found in problems(DOCKERFILE.replace(old, new)))


def test_ubuntu_and_apex_are_of_one_moment() -> None:
    assert re.fullmatch(r"20\d{6}T\d{6}Z", argument("UBUNTU_SNAPSHOT"))
    (install,) = (i.text for i in parse(DOCKERFILE) if "apt-get install" in i.text)
    assert install.index("APT::Snapshot") < install.index("apt-get update") < install.index("apt-get install")
    assert COMMIT.fullmatch(argument("APEX_COMMIT"))
    assert set(argument("TORCH_CUDA_ARCH_LIST").split(";")) >= {"8.0", "9.0"}


def test_every_package_of_the_lock_has_one_version_and_a_checksum() -> None:
    lines = requirement_lines("cuda-lock.txt")
    assert [line for line in [*lines, *requirement_lines("cuda-source.txt")] if not PACKAGE.match(line)] == []
    assert len(versions("cuda-lock.txt")) == len(lines) > 200


def test_the_lock_holds_what_was_asked_for() -> None:
    lock = versions("cuda-lock.txt")
    for name in ("cuda.txt", "cuda-overrides.txt"):
        asked = versions(name)
        assert {package: lock.get(package) for package in asked} == asked, "run tools/lock_cuda.py"


def test_the_parts_go_together() -> None:
    lock, source, cpu = versions("cuda-lock.txt"), versions("cuda-source.txt"), versions("cpu-no-deps.txt")
    assert lock["sglang"] == cpu["sglang"]
    assert lock["torchvision"] == cpu["torchvision"]
    assert lock["megatron-core"] == cpu["megatron-core"]
    assert lock["transformers"] == versions("cpu.txt")["transformers"]
    assert set(source) == {"transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"}
    assert len(set(source.values())) == 1
    (base,) = (i.text for i in parse(DOCKERFILE) if i.keyword == "FROM")
    toolkit = re.search(r"cuda:(\d+\.\d+)", base)
    assert toolkit is not None
    assert lock["cuda-toolkit"].startswith(toolkit[1] + "."), "apex is compiled with the CUDA that torch was built with"


def test_nothing_reaches_the_image_by_accident() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    shown = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert next(rule for rule in rules if rule and not rule.startswith("#")) == "*"
    assert [path for path in shown if not (ROOT / path).exists()] == []
    needed = {word for i in parse(DOCKERFILE) if i.keyword == "COPY" for word in i.text.split()[:-1]} - {"."}
    assert {path.split("/")[0] for path in needed} | {"pyproject.toml", "megatron_mmrl", "configs"} <= set(shown)
