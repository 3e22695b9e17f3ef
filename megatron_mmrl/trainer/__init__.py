"""The Megatron policy: forward passes, log-probs, updates."""
