"""A base model with a LoRA adapter that is being trained (peft; LoRA, arXiv 2106.09685).

The base's weights are never changed. Three views of one model in memory:

    active   the base with its adapter beside it, as trained
    off      the base alone: references cost no second model
    merged   weights with the adapter added, for reading without gradients of the weights; the
             base's own tensors come back afterwards, to the bit
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.cards import CARD, write_card
from core.errors import AttackPlaneError
from core.models import LoadedModel, evaluating
from core.products import LINEAR
from core.rows import Row
from training.config import TrainConfig


def adapted_layers(
    base: LoadedModel, *, all_linear: bool, blocks: range | None = None
) -> list[str]:
    """Full names of the linear layers that get an adapter.

    They are those inside attention modules (q, k, v, o, or fused ones), or all of the blocks.

    Raises:
        AttackPlaneError: there are none.
    """
    other = ("Conv1D", "Linear4bit", "Linear8bitLt")
    chosen = base.blocks if blocks is None else [base.blocks[i] for i in blocks]
    inside = {id(module) for block in chosen for module in block.modules()}
    layers = [
        name
        for name, module in base.model.named_modules()
        if (type(module) in LINEAR or type(module).__name__ in other)
        and id(module) in inside
        and (all_linear or any("attn" in p or "attention" in p for p in name.split(".")[:-1]))
    ]
    if not layers:
        raise AttackPlaneError("found no layers to adapt", where=type(base.model).__name__)
    return layers


class Dropout(nn.Dropout):
    """Dropout whose mask costs less on a CPU: each random word of 64 bits decides on four entries.

    torch draws a number for every entry, on one core: a sixth of a training's time. The rate is
    rounded to 2^-16.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p or input.device.type != "cpu":
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        pieces = words.view(torch.int16)[: input.numel()].view(input.shape)
        kept = pieces >= round(self.p * 2**16) - 2**15
        return input * kept.to(input.dtype).mul_(1 / (1 - self.p))


class Adapted:
    """A base with a fresh adapter.

    Args:
        base: its modules get LoRA layers beside them, so that ``base`` itself is the tuned model
            from here on.
        blocks: transformer blocks that are adapted; None: all.
    """

    def __init__(
        self, base: LoadedModel, config: TrainConfig, *, blocks: range | None = None
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.loaded = base
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=adapted_layers(base, all_linear=config.all_linear, blocks=blocks),
            task_type="CAUSAL_LM",
        )
        self.tuned: Any = get_peft_model(base.model, lora)
        for name, module in self.tuned.named_modules():
            if type(module) is nn.Dropout and "lora_dropout" in name:
                module.__class__ = Dropout

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.tuned.parameters() if p.requires_grad]

    @contextmanager
    def off(self) -> Iterator[None]:
        """While open the model is its base, without dropout; no gradients are kept."""
        with torch.no_grad(), evaluating(self.loaded), self.tuned.disable_adapter():
            yield

    @contextmanager
    def merged(self, *, reduced: bool = False) -> Iterator[None]:
        """While open the adapter is part of the weights, without dropout.

        ``reduced``: products with these weights in bfloat16, from copies that are made once.
        """
        from peft.tuners.lora import LoraLayer

        layers: list[Any] = [m for m in self.tuned.modules() if isinstance(m, LoraLayer)]
        linear: list[Any] = [layer.get_base_layer() for layer in layers]
        if not all(module.weight.is_floating_point() for module in linear):
            with evaluating(
                self.loaded
            ):  # 4-bit weights take no addition: the adapter stays beside
                yield
            return
        own = [module.weight.data for module in linear]
        name = self.tuned.active_adapter
        with evaluating(self.loaded), self.tuned.disable_adapter():
            try:
                for layer, module, weight in zip(layers, linear, own, strict=True):
                    with torch.no_grad():
                        whole = weight + layer.get_delta_weight(name).to(weight.dtype)
                    if reduced and type(module) in LINEAR:
                        vars(module)["forward"] = _in_bfloat16(whole, module.bias)
                    else:
                        module.weight.data = whole
                yield
            finally:
                for module, weight in zip(linear, own, strict=True):
                    module.weight.data = weight
                    vars(module).pop("forward", None)

    # --- saving -----------------------------------------------------------------------------------
    def weights(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.tuned)

    def restore(self, weights: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.tuned, weights)

    def save(self, path: Path, card: Row) -> None:
        """Write an adapter folder so that it appears only when whole.

        Raises:
            AttackPlaneError: a folder stands there that no training wrote.
        """
        if path.exists() and not (path / CARD).is_file():
            raise AttackPlaneError(
                "a folder of that name is there, and no training wrote it",
                where=path,
                remedy="choose another --out; nothing was deleted",
            )
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        self.tuned.save_pretrained(part)
        config = json.loads((part / "adapter_config.json").read_text())
        # a set's order is the process's
        config["target_modules"] = sorted(config["target_modules"])
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_card(part, card)
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        part.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _in_bfloat16(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear layer whose product is taken in bfloat16; what goes in and out keeps its type."""
    narrow = weight.bfloat16()
    added = None if bias is None else bias.detach().bfloat16()

    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x.bfloat16(), narrow, added).to(x.dtype)

    return forward
