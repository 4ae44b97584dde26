"""Supervised fine-tuning to refuse: LoRA on refusals and on ordinary replies.

    loss = mean over reply tokens of the batch of -log p(token | prompt, reply so far)

in nats per reply token.

The ordinary replies are the base model's own greedy ones, so that the tuning moves nothing but
refusal. Checkpoints are LoRA folders, usable as targets by the spec ``BASE+FOLDER``. A stopped
training goes on from its last saved state with the same result. Defaults follow "Dynamic
Adversarial Fine-Tuning" (arXiv 2604.27019, its SFT arm).
"""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.models import LoadedModel, ModelHandle
from core.progress import bar as progress_bar
from core.prompt import Renderer
from core.rows import Row
from core.specs import parse_spec
from core.store import RunFolder, write_atomically
from training.examples import Example, batches, collate, make_example
from training.losses import predicting_positions, reply_loss

log = logging.getLogger(__name__)
STATE, LOSSES = "state.pt", "losses.csv"


@dataclass(frozen=True)
class SFTConfig:
    """Settings of the training.

    Steps are optimiser steps, ``batch_size`` is sequences, ``max_tokens`` is tokens of a sequence.
    """

    num_steps: int = 500
    checkpoints: tuple[int, ...] = (50, 100, 250, 500)
    batch_size: int = 16
    learning_rate: float = 2e-5
    warmup_steps: int = 0
    lora_rank: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    precision: str = "float32"
    """Of the products: float32, or bfloat16 (autocast; weights and optimiser stay as they are)."""
    all_linear: bool = False
    """LoRA on every linear layer of the blocks, not on those of attention alone (as the paper)."""
    max_tokens: int = 512
    reply_tokens: int = 48
    """New tokens of the base model's own replies to harmless prompts (not in the paper, which uses
    UltraChat)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.checkpoints or not all(1 <= c <= self.num_steps for c in self.checkpoints):
            raise AttackPlaneError(
                "checkpoints must lie within the steps",
                where="train sft",
                got=f"checkpoints {self.checkpoints}, {self.num_steps} steps",
                remedy=f"for example checkpoints ({self.num_steps},)",
            )
        if self.precision not in ("float32", "bfloat16"):
            raise AttackPlaneError(
                "unknown precision",
                where="train sft",
                got=self.precision,
                remedy="float32 or bfloat16",
            )


def learning_rate(config: SFTConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero; ``step`` counts from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def adapted_layers(base: LoadedModel, *, all_linear: bool) -> list[str]:
    """Full names of the linear layers that get an adapter.

    They are those inside attention modules (q, k, v, o, or fused ones), or all of the blocks.

    Raises:
        AttackPlaneError: there are none.
    """
    linear = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    inside = {id(module) for block in base.blocks for module in block.modules()}
    layers = [
        name
        for name, module in base.model.named_modules()
        if type(module).__name__ in linear
        and id(module) in inside
        and (all_linear or any("attn" in p or "attention" in p for p in name.split(".")[:-1]))
    ]
    if not layers:
        raise AttackPlaneError("found no layers to adapt", where=type(base.model).__name__)
    return layers


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global stream, which dropout and LoRA draw from, and restore it afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


OwnReplies = Callable[[LoadedModel, Sequence[str], int], list[tuple[str, bool]]]
"""(model, requests, tokens) -> the base model's replies, and whether each came to its end."""


def train(
    spec: str,
    refusals: Sequence[tuple[str, str]],
    harmless: Sequence[str],
    config: SFTConfig,
    out: Path,
    *,
    own_replies: OwnReplies,
    save_every: int = 10,
) -> list[Path]:
    """Train and return the checkpoint folders ``out/step-N``.

    Args:
        refusals: (harmful request, refusal) pairs.
        harmless: requests, which get the base model's own replies.
    """
    parsed = parse_spec(spec)
    if parsed.adapter:
        raise AttackPlaneError(
            "train on a base without adapter", got=spec, remedy="merge the adapter first"
        )
    with RunFolder(out) as folder, seeded(config.seed):
        handle = ModelHandle(spec)
        settings = {**vars(config), "checkpoints": list(config.checkpoints)}
        settings["examples"] = [list(r) for r in refusals] + list(harmless)
        folder.begin_stage("sft", settings, {spec: handle.fingerprint})
        paths = [out / f"step-{step}" for step in config.checkpoints]
        state = _saved_state(out / STATE)
        done = len(state["losses"]) if state else 0
        there = [(path / "adapter_config.json").is_file() for path in paths]
        if all(there) and done == config.num_steps:
            log.info("all checkpoints are there: %s", out)
            return paths
        gone = zip(there, config.checkpoints, strict=True)
        if any(not have and step <= done for have, step in gone):
            log.warning("%s: a checkpoint that was trained is gone; training anew", out)
            state = None
        base = handle.loaded
        examples = _examples(base, refusals, harmless, config, own_replies)
        run = _Training(base, config, out, state)
        run.steps(examples, save_every)
        return paths


def _saved_state(path: Path) -> Row | None:
    return torch.load(path, weights_only=True) if path.is_file() else None


def _examples(
    base: LoadedModel,
    refusals: Sequence[tuple[str, str]],
    harmless: Sequence[str],
    config: SFTConfig,
    own_replies: OwnReplies,
) -> list[Example]:
    """Refusals, then the base model's own replies, each cut to the longest allowed sequence."""
    renderer = Renderer(base)
    answers = own_replies(base, harmless, config.reply_tokens)
    if empty := sum(not reply for reply, _ in answers):
        log.warning("%d of %d harmless prompts got no answer: left out", empty, len(answers))
    examples = [make_example(renderer, request, refusal) for request, refusal in refusals]
    examples += [
        make_example(renderer, request, reply, ended=ended)
        for request, (reply, ended) in zip(harmless, answers, strict=True)
        if reply
    ]
    return [Example(e.ids[: config.max_tokens], e.reply_start) for e in examples]


class _Training:
    """A LoRA adapter with its optimiser, and how both are saved and taken up again."""

    def __init__(self, base: LoadedModel, config: SFTConfig, out: Path, state: Row | None) -> None:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        self.config, self.out, self.device = config, out, base.device
        self.keeps = base.takes_logits_to_keep
        pad = base.tokenizer.pad_token_id
        self.pad = pad if pad is not None else 0
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=adapted_layers(base, all_linear=config.all_linear),
            task_type="CAUSAL_LM",
        )
        self.tuned: Any = get_peft_model(base.model, lora)
        parameters = [p for p in self.tuned.parameters() if p.requires_grad]
        rate = config.learning_rate
        self.optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        self.losses: list[dict[str, float]] = []
        if state is None:
            torch.manual_seed(config.seed + 1)
        else:
            set_peft_model_state_dict(self.tuned, state["adapter"])
            self.optimiser.load_state_dict(state["optimiser"])
            torch.set_rng_state(state["random"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["random_cuda"])
            self.losses = state["losses"]

    def save(self) -> None:
        """The whole state, and the losses as a table; each appears only when whole."""
        from peft import get_peft_model_state_dict

        buffer = io.BytesIO()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        torch.save(
            {
                "adapter": get_peft_model_state_dict(self.tuned),
                "optimiser": self.optimiser.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": cuda,
                "losses": self.losses,
            },
            buffer,
        )
        write_atomically(self.out / STATE, buffer.getvalue())
        table = "step,loss,learning_rate\n" + "".join(
            f"{int(r['step'])},{r['loss']:.6f},{r['learning_rate']:.3e}\n" for r in self.losses
        )
        write_atomically(self.out / LOSSES, table)

    def steps(self, examples: Sequence[Example], save_every: int) -> None:
        """Go on to the last step, with checkpoints on the way."""
        self.tuned.train()
        config = self.config
        order = batches(len(examples), config.batch_size, config.seed)
        with progress_bar(config.num_steps, "sft", "step", leave=None) as bar:
            for step in range(config.num_steps):
                chosen = next(order)
                bar.update(1)
                if step < len(self.losses):
                    continue
                loss = self.step([examples[i] for i in chosen], step)
                bar.set_postfix_str(f"loss {loss:.3f}")
                checkpoint = step + 1 in config.checkpoints
                if checkpoint:
                    _save_checkpoint(self.tuned, self.out / f"step-{step + 1}")
                if checkpoint or (step + 1) % save_every == 0:
                    self.save()

    def logits(self, ids: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        """(batch, positions, vocabulary) of the model's own head at these positions."""
        if self.keeps:
            out = self.tuned(input_ids=ids, attention_mask=mask, logits_to_keep=at)
            return out.logits
        return self.tuned(input_ids=ids, attention_mask=mask).logits[:, at]

    def step(self, examples: Sequence[Example], step: int) -> float:
        """One optimiser step; its loss in nats per reply token.

        Raises:
            AttackPlaneError: the loss is not finite.
        """
        ids, mask, labels = (t.to(self.device) for t in collate(examples, self.pad))
        at = predicting_positions(labels)
        rate = learning_rate(self.config, step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        reduced = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=reduced):
            loss = reply_loss(self.logits(ids, mask, at), labels[:, at + 1])
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        value = float(loss.detach())
        self.losses.append({"step": step + 1, "loss": value, "learning_rate": rate})
        if not math.isfinite(value):
            raise AttackPlaneError(
                "the training loss is not finite",
                where=f"{self.out}, step {step + 1}",
                remedy="lower the learning rate or use ?dtype=float32",
            )
        return value


def _save_checkpoint(tuned: Any, path: Path) -> None:
    """Write an adapter folder so that it appears only when whole."""
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    tuned.save_pretrained(part)
    config = json.loads((part / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set's order is the process's
    (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
