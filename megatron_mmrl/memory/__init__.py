"""Sizes of a model and its layout -> bytes per GPU and per node. Pure: loads no torch. Formulas: docs/memory.md."""
