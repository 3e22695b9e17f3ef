"""The command and environment of one node's share, and what the commands print and refuse before they start it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mmrl import cli
from megatron_mmrl.cluster.plan import Topology
from megatron_mmrl.cluster.torchrun import NodeShare, environment, torchrun_command
from megatron_mmrl.parallel.network import interface_of, interface_towards, only_meant_here
from tests.e2e.run import CONFIG, REPOSITORY

PRESET = str(REPOSITORY / "configs" / "presets" / "mm_eureka_32b.yaml")
SHARE = NodeShare(topology=Topology(num_nodes=3, ranks_per_node=4), node=1, master_addr="first-host", master_port=29517)


def test_a_node_has_its_ranks_and_torchrun_its_command() -> None:
    assert list(SHARE.ranks) == [4, 5, 6, 7]
    assert torchrun_command(SHARE, "package.module", ["--config", "a b.yaml"])[1:] == [
        "-m", "megatron_mmrl.cluster.agent", "--nnodes=3", "--nproc-per-node=4", "--node-rank=1",
        "--master-addr=first-host", "--master-port=29517", "-m", "package.module", "--config", "a b.yaml",
    ]  # fmt: skip


def test_the_users_variables_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    found = environment(SHARE, tmp_path)
    assert (found["OMP_NUM_THREADS"], found["PYTHONUNBUFFERED"]) == ("7", "1")
    assert found["MMRL_FAILURE_DIR"] == str(tmp_path)


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_a_dry_run_needs_no_model_and_says_the_same_again(launcher: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_mmrl.cli", "launch", launcher, "--config", PRESET, "--nodes", "2"]
    first, second = (
        subprocess.run([*command, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout == second.stdout
    assert first.stderr == "note: model.path=models/Qwen2.5-VL-32B-Instruct is not here; its sizes are known by name\n"
    assert "\n# 2 node(s) x 8 = 16 ranks\n" in first.stdout
    assert "\n#      1     1       8    8 9 10 11 12 13 14 15\n" in first.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_prints_every_nodes_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", PRESET, "--nodes", "2", "--dry-run", "--master-addr", "head", "run.seed=3"]
    assert cli.main(["launch", "torchrun", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "# environment of every rank: MMRL_OUTPUT_TO_FILES=1" in lines
    for node in (0, 1):
        command = lines[lines.index(f"# on node {node}") + 1]
        assert f"--node-rank={node} --master-addr=head " in command
        assert command.endswith(f"-m megatron_mmrl.train --config {PRESET} run.seed=3")


def test_a_dry_run_loads_nothing_heavy() -> None:
    code = "import sys; from megatron_mmrl import cli; "
    code += f"cli.main(['launch', 'slurm', '--config', {PRESET!r}, '--nodes', '2', '--dry-run']); "
    code += "print(*(name for name in ('torch', 'transformers', 'megatron', 'sglang', 'ray') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--node and --master-addr say which node this is and where node 0 is; or use --dry-run"),
        (["--node", "2", "--master-addr", "head"], "--node 2 is not one of the 2 nodes, 0 to 1"),
        (["--node", "0", "--master-addr", "head", "run.sed=1"], "unknown key run.sed; did you mean run.seed?"),
    ],
)
def test_what_is_refused_leaves_its_exit_code_for_the_scheduler(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_mmrl.quickstart import prepare

    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / "runs" / "prepared")
    words = ["launch", "torchrun", "--config", str(CONFIG), "--nodes", "2", "--exit-file", "code", *words]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    assert Path("code").read_text() == "2"
    Path("code").write_text("85")  # another node's, which was first
    assert cli.main(words) == 2
    assert Path("code").read_text() == "85"


def test_the_interface_is_the_one_whose_address_packets_leave_from() -> None:
    interfaces = {"lo": ["127.0.0.1", "::1"], "ib0": ["10.1.0.7", "fe80::1%ib0"], "eth0": ["192.168.3.4"]}
    assert [interface_of(address, interfaces) for address in ("10.1.0.7", "fe80::1", "192.168.3.4")] == [
        "ib0", "ib0", "eth0",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no network interface has the address 10.9.9.9 .* cluster.network_interface"):
        interface_of("10.9.9.9", interfaces)


def test_loopback_is_found_and_an_unknown_host_is_named() -> None:
    assert interface_towards("127.0.0.1") == interface_towards("localhost") == "lo"
    assert not only_meant_here("127.0.0.1")
    assert not only_meant_here("localhost")
    with pytest.raises(ValueError, match=r"^MASTER_ADDR=nowhere.invalid cannot be reached from "):
        interface_towards("nowhere.invalid")


@pytest.mark.parametrize(
    ("addresses", "only_here"), [(["127.0.1.1"], True), (["10.0.0.1"], False), (["::1", "10.0.0.1"], False)]
)
def test_a_hosts_own_name_may_mean_loopback(
    addresses: list[str], only_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (address, 9)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows)  # what /etc/hosts of another machine says
    assert only_meant_here("node0") is only_here
