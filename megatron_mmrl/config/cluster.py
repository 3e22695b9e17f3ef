"""How the processes of a run are started over nodes, watched, and ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mmrl.config.checks import at_least, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmConfig:
    """Keys under ``cluster.slurm.``, for ``mmrl launch slurm``. What is unset is left to the site's defaults."""

    job_name: str = "mmrl"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str | None = None
    """As sbatch takes it: ``minutes``, ``hours:minutes:seconds`` or ``days-hours:minutes:seconds``."""
    signal_before_end_s: int = 300
    """Slurm asks the job to save so long before its time is up."""
    max_requeues: int = 10
    """A job that was asked to stop is queued again so many times; 0: never."""
    python: str | None = None
    """Interpreter of the tasks; unset: the one that ran ``mmrl``, or in a container its ``python``."""
    cpus_per_node: int | None = None
    """CPUs of each node that the job gets; unset: whole nodes, with all their memory."""
    gpus_option: str | None = "--gpus-per-node"
    """How GPUs are asked for: ``--gpus-per-node``, ``--gres=gpu`` (older sites), or null for machines without."""
    container_image: str | None = None
    """Run every task in this image (pyxis: ``--container-image``); unset: no container."""
    container_mounts: list[str] = field(default_factory=list)
    """``SOURCE:TARGET`` pairs; the working directory is mounted in any case."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run on the first node before the tasks, such as ``module load cuda``."""
    extra_options: list[str] = field(default_factory=list)
    """More ``#SBATCH`` options, each as it would stand there: ``--exclusive``."""

    def __post_init__(self) -> None:
        at_least("cluster.slurm.signal_before_end_s", self.signal_before_end_s, 60)
        at_least("cluster.slurm.max_requeues", self.max_requeues, 0)
        if self.cpus_per_node is not None:
            at_least("cluster.slurm.cpus_per_node", self.cpus_per_node, 1)
        for key in ("setup", "extra_options", "container_mounts"):
            for line in getattr(self, key):
                require("\n" not in line, f"cluster.slurm.{key}: {line!r} holds a line break; give one item per line")
        for key in ("job_name", "partition", "account", "qos", "time_limit", "gpus_option"):
            value = getattr(self, key)
            require(value is None or value.isprintable(), f"cluster.slurm.{key}={value!r} holds a control character")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Keys under ``cluster.``"""

    timeout_s: int = 1800
    """A rank that makes no progress for so long ends the run, with the stacks of all ranks; 0: never."""
    preflight: bool = True
    """Before weights are read, have all ranks compare versions, configuration, paths, memory and network."""
    network_interface: str | None = None
    """Interface of gloo's and NCCL's connections between nodes; unset: the one that leads to MASTER_ADDR."""
    master_port: int = 29500
    """Where ranks of several nodes meet, on the first node."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        at_least("cluster.timeout_s", self.timeout_s, 0)
        require(1024 <= self.master_port < 65536, f"cluster.master_port={self.master_port}: use 1024 to 65535")
