"""From Megatron's shards to the rollout engine's weights."""
