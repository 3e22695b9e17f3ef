"""From a configuration to the running parts of one rank, and back down again: the composition root."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_mmrl import pulse
from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.cluster.failure import failure_recorded
from megatron_mmrl.cluster.plan import own_devices
from megatron_mmrl.cluster.rollcall.call import call_roll, require_agreement
from megatron_mmrl.cluster.watchdog import watched
from megatron_mmrl.config import Config
from megatron_mmrl.controller.handover import ByName, Handover, WeightPath
from megatron_mmrl.controller.scoring import Scorer
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.data.source import PromptSource, prompt_source
from megatron_mmrl.models.hf_io import write_checkpoint
from megatron_mmrl.models.registry import model_facts, position_ids_function
from megatron_mmrl.parallel.collectives import Collectives
from megatron_mmrl.parallel.device import device
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.parallel.state import initialize, shutdown
from megatron_mmrl.reshard.between import planner_of
from megatron_mmrl.reshard.publish import SharedWeights
from megatron_mmrl.reshard.session import WeightSession
from megatron_mmrl.rewards.pool import RewardPool
from megatron_mmrl.rewards.remote import KEY, Endpoint, endpoints_of
from megatron_mmrl.rollout.fleet import EngineFleet
from megatron_mmrl.rollout.routing import leader_ranks
from megatron_mmrl.rollout.server_args import EngineModel
from megatron_mmrl.rollout.sglang_client import start_engine
from megatron_mmrl.trainer.forward import TokenDistribution
from megatron_mmrl.trainer.packing import InputRules, Packer
from megatron_mmrl.trainer.plan import Multiples
from megatron_mmrl.trainer.policy import MegatronPolicy
from megatron_mmrl.types import SamplingParams

if TYPE_CHECKING:
    from megatron_mmrl.algorithms.registry import Algorithm
    from megatron_mmrl.reshard.plan import Planner
    from megatron_mmrl.types import EncodedPrompt, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Machinery:
    """What training and evaluation both need, on one rank."""

    config: Config
    layout: ParallelLayout
    exchange: Collectives
    processor: Processor
    policy: MegatronPolicy
    fleet: EngineFleet
    pool: RewardPool
    scorer: Scorer
    handover: Handover
    packer: Packer
    algorithm: Algorithm
    sampling: SamplingParams

    @pulse.phase("open data")
    def prompts(self, files: Sequence[str], quarantine: Path, max_rows: int | None = None) -> PromptSource:
        """The prompts of ``files``, or of their first ``max_rows`` rows.

        Rows that are bad, or whose gold answer no reward can parse, are set aside.
        """
        return prompt_source(
            files,
            replace(self.config.data, max_samples=max_rows),
            self.processor,
            seed=self.config.run.seed,
            quarantine_path=quarantine,
            keep=self._reason_to_drop,
            exchange=self.exchange,
        )

    @pulse.phase("encode held-out prompts")
    def eval_prompts(self, quarantine: Path) -> list[EncodedPrompt]:
        """The held-out prompts, encoded once; [] when the configuration names none."""
        files, limit = self.config.data.eval_files, self.config.run.max_eval_prompts
        return self.prompts(files, quarantine).all(limit) if files else []

    @pulse.phase("export")
    def export(self, out_dir: Path) -> None:
        """Write the policy as a Hugging Face checkpoint, which appears whole and replaces an older one. Collective."""
        weights = self.policy.weights()
        if self.exchange.rank == 0:
            draft = out_dir.with_name(f".{out_dir.name}.tmp")
            write_checkpoint(draft, weights, source=Path(self.config.model.path))
            if out_dir.exists():
                shutil.rmtree(out_dir)
            draft.rename(out_dir)
        else:
            for _ in weights:
                pass  # making the full tensors is collective
        self.exchange.barrier()

    def _reason_to_drop(self, prompt: Prompt) -> str | None:
        (good,) = self.pool.check_prompts([prompt])
        return None if good else f"the gold answer {prompt.answer!r} cannot be parsed"


@contextmanager
def machinery(config: Config, scratch: Path) -> Iterator[Machinery]:
    """Join the world, start this rank's share of engines and workers, build the policy; end all of it on leaving.

    Args:
        config: checked.
        scratch: directory for the engines' model directory and logs, shared by all ranks.
    """
    with ExitStack() as stack, failure_recorded():  # recorded before the clean-up, which may wait for other ranks
        stack.callback(shutdown)  # last, after the watchdog has taken leave: rank 0 may serve its store
        stack.enter_context(watched(config.cluster.timeout_s, scratch))
        with pulse.phase("join"):
            layout = initialize(config.parallel, config.run.seed, config.cluster.network_interface)
        exchange = Collectives()
        if config.cluster.preflight:
            require_agreement(call_roll(config, exchange), exchange.rank)
        with pulse.phase("read tokenizer"):
            processor = Processor(config.model.path, config.data)
        with pulse.phase("start reward workers"):
            pool = stack.enter_context(RewardPool(config.reward, _remote_workers(config, exchange)))
        planner = planner_of(config) if config.reshard.method == "in_place" else None
        fleet = _start_fleet(config, processor, exchange, scratch, planner)
        stack.callback(fleet.close)
        with pulse.phase("read weights"):
            policy = MegatronPolicy(config, _distribution(config, processor), exchange)
        yield Machinery(
            config=config,
            layout=layout,
            exchange=exchange,
            processor=processor,
            policy=policy,
            fleet=fleet,
            pool=pool,
            scorer=Scorer(pool, exchange),
            handover=Handover(policy, fleet, _weight_path(config, policy, fleet, exchange, planner)),
            packer=packer_for(config, layout, processor.pad_token_id, exchange.rank),
            algorithm=build_algorithm(config.algorithm, max_response_tokens=config.rollout.max_response_tokens),
            sampling=_sampling(config),
        )


def _remote_workers(config: Config, exchange: Collectives) -> list[Endpoint]:
    """This rank's share of the workers that the launcher started elsewhere: leaders score, and so get them all."""
    leaders = leader_ranks(config.rollout.num_engines, exchange.world_size)
    workers = []
    if exchange.rank in leaders:
        workers = endpoints_of(os.environ, leaders.index(exchange.rank), len(leaders))
    os.environ.pop(KEY, None)  # no process that this one starts needs it
    return workers


def _weight_path(
    config: Config, policy: MegatronPolicy, fleet: EngineFleet, exchange: Collectives, planner: Planner | None
) -> WeightPath:
    if planner is None or policy.shared is None:
        return ByName(policy, fleet)
    session = WeightSession(config, planner, policy.chunks, policy.shared, exchange)
    return SharedWeights(session, fleet, exchange, policy.finish_updates)


@pulse.phase("start engines")
def _start_fleet(
    config: Config, processor: Processor, exchange: Collectives, scratch: Path, planner: Planner | None
) -> EngineFleet:
    """Leaders start one engine each, from a model directory without weights: those are the policy's."""
    model_dir = scratch / "engine_model"
    if exchange.rank == 0:
        processor.write_engine_dir(model_dir)
    exchange.barrier()
    leaders = leader_ranks(config.rollout.num_engines, exchange.world_size)
    start = None
    if exchange.rank in leaders:
        index = leaders.index(exchange.rank)
        model = EngineModel(
            path=model_dir,
            dtype=config.model.dtype,
            device="cuda" if device().type == "cuda" else "cpu",
            devices=_devices(config, index, planner),
            seed=config.run.seed + index,
        )
        start = functools.partial(
            start_engine,
            config.rollout,
            model,
            banned_token_ids=processor.banned_token_ids(),
            decode=processor.decode,
            log_path=scratch / f"engine{index}.log",
        )
    return EngineFleet(
        start,
        exchange,
        num_engines=config.rollout.num_engines,
        bucket_bytes=config.rollout.weight_bucket_bytes,
        max_restarts=config.rollout.max_engine_restarts,
    )


def _devices(config: Config, engine: int, planner: Planner | None) -> tuple[int, ...]:
    """GPUs of an engine's node on which its ranks run, in their order."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size))
    own = planner.devices[engine] if planner else own_devices(config)[engine]
    return tuple(rank % per_node for rank in own)


def _distribution(config: Config, processor: Processor) -> TokenDistribution:
    return TokenDistribution(
        temperature=config.rollout.temperature,
        repetition_penalty=config.rollout.repetition_penalty,
        banned=torch.tensor(processor.banned_token_ids(), dtype=torch.int64, device=device()),
        vocab_size=processor.vocab_size,
        chunk_tokens=config.trainer.logprob_chunk_tokens,
    )


def packer_for(config: Config, layout: ParallelLayout, pad_id: int, rank: int) -> Packer:
    """What makes the micro-batches that ``rank`` reads."""
    facts = model_facts(config.model.path)
    at = layout.coordinates(rank)
    return Packer(
        trainer=config.trainer,
        num_replicas=layout.data,
        replica=at.data,
        multiples=Multiples.of(config.parallel),
        rules=InputRules(
            position_ids=position_ids_function(facts),
            pad_id=pad_id,
            image_token_id=facts.image_token_id,
            merge_size=facts.merge_size,
        ),
        speaks_for_replica=at.tensor == at.pipeline == at.context == 0,
    )


def _sampling(config: Config) -> SamplingParams:
    return SamplingParams(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        repetition_penalty=config.rollout.repetition_penalty,
        max_new_tokens=config.rollout.max_response_tokens,
        num_samples=config.rollout.samples_per_prompt,
    )
