"""GRPO as in DeepSeekMath (arXiv:2402.03300), algorithm 1; every rank runs this same loop."""

from __future__ import annotations

from megatron_mmrl.controller.batches import minibatches, with_logprobs
from megatron_mmrl.controller.evaluate import evaluate
from megatron_mmrl.controller.parts import Parts
from megatron_mmrl.controller.rollout import collect
from megatron_mmrl.controller.stats import check_mismatch, rollout_stats, update_stats
from megatron_mmrl.trainer.sequences import sequences_of


def train(parts: Parts) -> int:
    """Train from the step after ``start_step`` to the last, or to the end of the step in which a stop was asked for.

    Row n of the metrics describes step n, row 0 the start. Returns the number of steps done.
    """
    cfg, policy, log = parts.config, parts.policy, parts.log
    step = parts.start_step
    parts.handover.publish(step)  # pi_old <- pi_theta
    if step == 0 and cfg.run.evaluate_before_training:
        log.write(0, evaluate(parts, step=0))
    while step < parts.num_steps and not parts.stop_requested():
        step += 1
        with log.time("step"):
            rollout = collect(parts, step)  # q ~ D, o_i ~ pi_old(.|q), r_i = R(q, o_i)
            with log.time("logprobs"):
                sequences = with_logprobs(parts, sequences_of(rollout.groups))  # log pi_old, log pi_ref
            sequences = parts.algorithm.advantages(rollout.groups, sequences)  # A_i,t
            with log.time("update"):
                updates = [
                    policy.update(batch, parts.algorithm.loss)  # theta <- theta - lr * dJ/dtheta
                    for _ in range(cfg.algorithm.num_iterations)  # mu in the paper
                    for batch in minibatches(parts, sequences)
                ]
            with log.time("sync"):
                parts.handover.publish(step)  # pi_old <- pi_theta
            parts.refresh_reference_if_due(step)  # pi_ref <- pi_theta
        stats = rollout_stats(rollout.generated) | rollout.counters() | update_stats(updates)
        stats |= parts.scorer.counters() | parts.prompts.counters() | parts.handover.counters()
        log.completions(step, rollout.generated)
        log.write(step, stats | (evaluate(parts, step) if parts.evaluation_due(step) else {}))
        check_mismatch(stats, cfg.algorithm.max_mismatch, step)
        parts.save_if_due(step)
    return step
