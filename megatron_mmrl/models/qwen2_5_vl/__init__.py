"""Qwen2.5-VL: Hugging Face's vision tower on megatron-core's GPTModel."""
