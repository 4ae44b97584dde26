"""Supervised fine-tuning to refuse: LoRA on refusals for harmful prompts, ordinary replies for harmless ones.

    loss = mean over reply tokens of the batch of -log p(token | prompt, reply so far)        [nats per reply token]

The ordinary replies are the base model's own greedy ones, so that the tuning moves nothing but refusal. Checkpoints
are LoRA folders, usable as targets by the spec ``BASE+FOLDER``. A stopped training goes on from its last saved state
with the same result. Defaults follow "Dynamic Adversarial Fine-Tuning" (arXiv 2604.27019, its SFT arm).
"""

from __future__ import annotations

import io
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.errors import AttackPlaneError
from core.models import default_device, frozen, load_base, parse_spec
from core.prompt import Conversation, Renderer
from core.store import RunFolder, write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SFTConfig:
    """Units: steps are optimiser steps, ``batch_size`` is sequences, ``max_tokens`` is tokens of a sequence."""

    num_steps: int = 500
    checkpoints: tuple[int, ...] = (50, 100, 250, 500)
    batch_size: int = 16
    learning_rate: float = 2e-5
    warmup_steps: int = 0
    lora_rank: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    max_tokens: int = 512
    reply_tokens: int = 48
    """New tokens of the base model's own replies to harmless prompts (not in the paper, which uses UltraChat)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.checkpoints or not all(1 <= c <= self.num_steps for c in self.checkpoints):
            raise AttackPlaneError(
                "checkpoints must lie within the steps",
                where="train sft",
                got=f"checkpoints {self.checkpoints}, {self.num_steps} steps",
                remedy=f"for example --checkpoint {self.num_steps}",
            )


@dataclass(frozen=True)
class Example:
    """One sequence: ``ids`` with the reply at ``reply_start`` and after."""

    ids: tuple[int, ...]
    reply_start: int


def make_example(renderer: Renderer, request: str, reply: str, *, ended: bool = True) -> Example:
    """Prompt and reply as the chat template writes them; with ``ended`` the end-of-turn token is learnt too."""
    prompt = renderer.render(Conversation.build(request), reply)
    end = renderer.end_of_turn() if ended else ()
    return Example((*prompt.ids, *prompt.target_ids, *end), len(prompt.ids))


def collate(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (batch, tokens), attention mask, labels with -100 outside the replies; padded on the right."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), -100)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, e in enumerate(examples):
        values = torch.tensor(e.ids)
        ids[row, : len(values)] = values
        labels[row, e.reply_start : len(values)] = values[e.reply_start :]
        mask[row, : len(values)] = 1
    return ids, mask, labels


def reply_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch, tokens, vocabulary) and (batch, tokens) -> mean cross-entropy over labelled tokens, in nats."""
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


def learning_rate(config: SFTConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero; ``step`` counts from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def batches(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless shuffled batches, a new order an epoch; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def attention_projections(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside attention modules: q, k, v, o, or fused ones in families that fuse."""
    linear = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    found = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in linear
        and any("attn" in p or "attention" in p for p in name.split(".")[:-1])
    ]
    if not found:
        raise AttackPlaneError("found no attention projections", where=type(model).__name__)
    return found


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Dropout and LoRA initialisation draw from torch's global stream: seed it here, restore it after."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def train(
    spec: str,
    refusals: Sequence[tuple[str, str]],
    harmless: Sequence[str],
    config: SFTConfig,
    out: Path,
    *,
    own_replies: Any,
    save_every: int = 10,
) -> list[Path]:
    """Train and return the checkpoint folders ``out/step-N``.

    Args:
        refusals: (harmful request, refusal) pairs. harmless: requests; ``own_replies(loaded, requests, tokens)``
            gives the base model's replies and whether each came to its end.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    parsed = parse_spec(spec)
    if parsed.adapter:
        raise AttackPlaneError("train on a base without adapter", got=spec, remedy="merge the adapter first")
    with RunFolder(out) as folder, seeded(config.seed):
        device = default_device()
        model, tokenizer, source = load_base(parsed, device)
        base = frozen(parsed, model, tokenizer, source)
        settings = {**vars(config), "checkpoints": list(config.checkpoints)}
        settings["examples"] = [list(r) for r in refusals] + list(harmless)
        folder.begin_stage("sft", settings, {spec: base.fingerprint})
        paths = [out / f"step-{step}" for step in config.checkpoints]
        state_path = out / "state.pt"
        state = torch.load(state_path, weights_only=True) if state_path.is_file() else None
        done = len(state["losses"]) if state else 0
        there = [(path / "adapter_config.json").is_file() for path in paths]
        if all(there) and done == config.num_steps:
            log.info("all checkpoints are there: %s", out)
            return paths
        if any(not have and step <= done for have, step in zip(there, config.checkpoints, strict=True)):
            log.warning("%s: a checkpoint that was trained is gone; training anew", out)
            state = None
        renderer = Renderer(base)
        answers = own_replies(base, harmless, config.reply_tokens)
        if empty := sum(not reply for reply, _ in answers):
            log.warning("%d of %d harmless prompts got an empty reply and are left out", empty, len(answers))
        examples = [make_example(renderer, request, refusal) for request, refusal in refusals]
        examples += [
            make_example(renderer, request, reply, ended=ended)
            for request, (reply, ended) in zip(harmless, answers, strict=True)
            if reply
        ]
        examples = [Example(e.ids[: config.max_tokens], e.reply_start) for e in examples]
        tuned = get_peft_model(
            model,
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=attention_projections(model),
                task_type="CAUSAL_LM",
            ),
        )
        parameters = [p for p in tuned.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        losses: list[dict[str, float]] = []
        if state is not None:
            set_peft_model_state_dict(tuned, state["adapter"])
            optimiser.load_state_dict(state["optimiser"])
            torch.set_rng_state(state["random"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["random_cuda"])
            losses = state["losses"]
        else:
            torch.manual_seed(config.seed + 1)

        def save_state() -> None:
            buffer = io.BytesIO()
            torch.save(
                {
                    "adapter": get_peft_model_state_dict(tuned),
                    "optimiser": optimiser.state_dict(),
                    "random": torch.get_rng_state(),
                    "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                    "losses": losses,
                },
                buffer,
            )
            write_atomically(state_path, buffer.getvalue())
            table = "step,loss,learning_rate\n" + "".join(
                f"{int(r['step'])},{r['loss']:.6f},{r['learning_rate']:.3e}\n" for r in losses
            )
            write_atomically(out / "losses.csv", table)

        tuned.train()
        order = batches(len(examples), config.batch_size, config.seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        with tqdm(total=config.num_steps, desc="sft", unit="step") as bar:
            for step in range(config.num_steps):
                chosen = next(order)
                bar.update(1)
                if step < len(losses):
                    continue
                ids, mask, labels = (t.to(device) for t in collate([examples[i] for i in chosen], pad))
                rate = learning_rate(config, step)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                loss = reply_loss(tuned(input_ids=ids, attention_mask=mask).logits, labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append({"step": step + 1, "loss": float(loss.detach()), "learning_rate": rate})
                bar.set_postfix_str(f"loss {losses[-1]['loss']:.3f}")
                if not math.isfinite(losses[-1]["loss"]):
                    raise AttackPlaneError(
                        "the training loss is not finite",
                        where=f"{out}, step {step + 1}",
                        remedy="lower --learning-rate or use ?dtype=float32",
                    )
                if step + 1 in config.checkpoints:
                    _save_checkpoint(tuned, out / f"step-{step + 1}")
                if (step + 1) % save_every == 0 or step + 1 in config.checkpoints:
                    save_state()
        return paths


def _save_checkpoint(tuned: Any, path: Path) -> None:
    """Write an adapter folder so that it appears only when whole."""
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    tuned.save_pretrained(part)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
