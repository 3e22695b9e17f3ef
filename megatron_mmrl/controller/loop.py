"""GRPO as in DeepSeekMath (arXiv:2402.03300), algorithm 1; every rank runs this same loop."""

from __future__ import annotations

from megatron_mmrl.controller.batches import minibatches, with_logprobs
from megatron_mmrl.controller.evaluate import evaluate
from megatron_mmrl.controller.parts import Parts
from megatron_mmrl.controller.stats import check_mismatch, rollout_stats, update_stats
from megatron_mmrl.trainer.sequences import sequences_of


def train(parts: Parts) -> None:
    """Train from the step after ``start_step`` to the last; row n of the metrics describes step n, row 0 the start."""
    cfg, policy, log = parts.config, parts.policy, parts.log
    step = parts.start_step
    parts.handover.publish(step)  # pi_old <- pi_theta
    if step == 0 and cfg.run.evaluate_before_training:
        log.write(0, evaluate(parts, step=0))
    while step < parts.num_steps:
        step += 1
        with log.time("step"):
            with log.time("generate"), parts.handover.generating():
                prompts = parts.prompts.next(cfg.rollout.prompts_per_step)  # q ~ D
                groups = parts.fleet.generate(
                    prompts, parts.sampling, seed=cfg.run.seed, step=step
                )  # o_i ~ pi_old(.|q)
            with log.time("reward"):
                groups = parts.scorer.score(groups)  # r_i = R(q, o_i)
            groups = [group.with_advantages(parts.algorithm.advantage(group.rewards)) for group in groups]
            sequences = sequences_of([group for group in groups if parts.algorithm.select(group)])
            with log.time("logprobs"):
                sequences = with_logprobs(parts, sequences)  # log pi_old, log pi_ref
            with log.time("update"):
                updates = [
                    policy.update(batch, parts.algorithm.loss)  # theta <- theta - lr * dJ/dtheta
                    for _ in range(cfg.algorithm.num_iterations)  # mu in the paper
                    for batch in minibatches(parts, sequences)
                ]
            with log.time("sync"):
                parts.handover.publish(step)  # pi_old <- pi_theta
        stats = rollout_stats(groups) | update_stats(updates) | parts.scorer.counters() | parts.prompts.counters()
        stats |= parts.handover.counters()
        log.completions(step, groups)
        log.write(step, stats | (evaluate(parts, step) if parts.evaluation_due(step) else {}))
        check_mismatch(stats, cfg.algorithm.max_mismatch, step)
        parts.save_if_due(step)
