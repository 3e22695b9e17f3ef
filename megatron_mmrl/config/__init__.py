"""The configuration: one frozen dataclass per concern, cross-checked at the root. Loads no torch."""

from megatron_mmrl.config.build import ConfigError
from megatron_mmrl.config.load import dump_config, load_config
from megatron_mmrl.config.root import Config

__all__ = ["Config", "ConfigError", "dump_config", "load_config"]
