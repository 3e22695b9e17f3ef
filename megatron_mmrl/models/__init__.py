"""Models on megatron-core and their Hugging Face names."""
