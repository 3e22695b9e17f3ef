"""Weights that are read without calling their module: tell Megatron all the same."""

from __future__ import annotations

from torch import nn


def before_use(module: nn.Module) -> None:
    """Run the hooks that calling ``module`` and the modules in it would run first.

    With ``overlap_param_gather`` such a hook waits for the module's weights and starts the gather of the next ones.
    Left out, the weights may be those of the last update, and a data-parallel replica that does not call a module
    takes part in the gathers in another order than its peers.
    """
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            hook(part, ())
