"""Hooks on the residual stream where it enters a transformer block, and hooks that are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from core.rows import Row


def before_block(block: nn.Module, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Before each pass of a block call ``change`` with the residual that enters it.

    The residual is (batch, fed, d_model). What ``change`` returns takes its place; None leaves it.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Row) -> Any:
        changed = change(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed}

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def has_hooks(model: nn.Module) -> bool:
    """Whether something besides transformers itself, whose hooks know their thread, listens in."""
    hooks = (
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
