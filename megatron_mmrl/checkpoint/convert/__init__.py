"""Conversion between Hugging Face checkpoints and Megatron distributed checkpoints, tensor by tensor."""
