"""Ranks, devices and collectives: the only code that knows how processes are laid out."""

import warnings

# Megatron-core tells of every file that does without Transformer Engine or Apex, which are optional here, and it still
# calls collectives by names that torch has renamed. Neither is news to whoever starts a run.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
