"""How a row of a data file becomes a Prompt: one pure function per format, one file per family of formats."""

from megatron_mmrl.data.formats.registry import FORMATS as FORMATS
