"""The loop that every arm trains in: LoRA on a frozen base, checkpoints, and an exact resume.

One update:

1. Each of ``accumulation`` micro-batches gives losses (``Method.losses``); their gradients add up.
2. Gradients are added over processes, checked, and clipped.
3. AdamW takes a step at the schedule's rate.
4. The arm may do what it does between updates, such as estimating directions anew.
5. Every few updates all of this is saved, and at chosen ones a checkpoint is.

Randomness (dropout) is seeded by the number of the micro-batch. What the next update depends on is
thus the adapter, the optimiser and the arm's own state; a training that is killed at any moment
goes on from what was saved last, to the same weights, bit by bit, on the same machine.

A checkpoint is a LoRA folder, usable as a target by the spec ``BASE+FOLDER``.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from core.errors import AttackPlaneError
from core.memory import PEAK, peak_mib
from core.models import LoadedModel, ModelHandle
from core.progress import bar as progress_bar
from core.records import content_hash, stream_seed
from core.rows import Row
from core.specs import parse_spec
from core.store import RunFolder
from core.tracking import track
from evaluation.usability import request_hash
from training.adapter import Adapted
from training.config import TrainConfig, differences
from training.data import texts_of
from training.devices import Devices
from training.forward import Forward
from training.registry import Arm, Bench, Clock, Method, TrainResult
from training.requests import Requests
from training.saved import STATE, refuse_foreign, save_state, saved_state, write_tables

log = logging.getLogger(__name__)
STAGE = "train"
PROBE = (("Hello", "Hi there."), ("Write a list of two drinks", "1. tea\n2. coffee"))
"""On which it is tried whether batches can be packed."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global stream, which dropout and LoRA draw from, and restore it afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def train(
    arm: Arm,
    spec: str,
    requests: Requests,
    config: TrainConfig,
    out: Path,
    *,
    save_every: int = 10,
) -> TrainResult:
    """Train one arm; checkpoints are ``out/step-N``.

    Args:
        save_every: updates between two saves of the whole state.

    Raises:
        AttackPlaneError: the base has an adapter, the folder holds another training, the loss is
            not finite (nothing is saved then), or micro-batches cannot be shared out.
    """
    refuse_adapter(spec)
    devices = Devices()
    devices.check(config.accumulation)
    folder = RunFolder(out)
    with folder if devices.first else nullcontext(), seeded(config.seed):
        handle = ModelHandle(spec)
        if devices.first:
            refuse_foreign(out)
            settings = settings_of(arm, config, requests)
            folder.begin_stage(STAGE, settings, {spec: handle.fingerprint})
        paths = [out / f"step-{step}" for step in config.saved_steps]
        state = saved_state(out / STATE)
        done = len(state["losses"]) if state else 0
        there = [(path / "adapter_config.json").is_file() for path in paths]
        if state and all(there) and done == config.num_steps:
            log.info("all checkpoints are there: %s", out)
            if devices.first:
                write_tables(out, state["losses"], state["seconds"])
            return TrainResult(paths, state["losses"], state["seconds"], first=devices.first)
        gone = zip(there, config.saved_steps, strict=True)
        if any(not have and step <= done for have, step in gone):
            log.warning("%s: a checkpoint that was trained is gone; training anew", out)
            state = None
        run = Run(arm, handle, requests, config, folder, devices)
        if state:
            run.restore(state)
        run.go_on(save_every)
        devices.wait()
        return TrainResult(paths, run.losses, run.seconds, first=devices.first)


def refuse_adapter(spec: str) -> None:
    """Raises an error for a spec that has an adapter, or that is shared out over devices."""
    parsed = parse_spec(spec)
    if parsed.adapter:
        raise AttackPlaneError(
            "train on a base without adapter", got=spec, remedy="merge the adapter first"
        )
    if parsed.device_map:
        raise AttackPlaneError(
            "a training does not share one model out over devices",
            got=spec,
            remedy="leave ?device_map out; `accelerate launch` shares out the batches",
        )


def settings_of(arm: Arm, config: Any, requests: Requests) -> Row:
    """What the manifest keeps: all settings, how they differ from the paper's, and the requests."""
    saved = {"checkpoints": list(config.saved_steps)} if arm.method else {}
    return {
        "arm": arm.name,
        **vars(config),
        **saved,
        "differs_from_paper": differences(config, arm.make_config({})),
        "requests": requests.settings(arm.needs, arm.validates),
    }


def method_of(arm: Arm, config: Any, requests: Requests) -> str:
    """Stands for a way of training: the same for all its seeds, whichever steps were saved."""
    other = ("seed", "checkpoints", "differs_from_paper")
    settings = settings_of(arm, config, requests)
    return content_hash({k: v for k, v in settings.items() if k not in other})


def common_of(config: Any) -> str:
    """Stands for the settings of the loop, but seed and saved steps."""
    names = {f.name for f in dataclasses.fields(TrainConfig)} - {"seed", "checkpoints"}
    return content_hash({k: v for k, v in vars(config).items() if k in names})


def variant_of(arm: Arm, config: Any) -> Row:
    """The arm's own settings that are not its paper's: what makes it a control, say."""
    common = {f.name for f in dataclasses.fields(TrainConfig)}
    changed = differences(config, arm.make_config({}))
    return {name: value for name, (_, value) in changed.items() if name not in common}


class Run:
    """One training: model and adapter, optimiser, the arm's method, and what was logged."""

    def __init__(
        self,
        arm: Arm,
        handle: ModelHandle,
        requests: Requests,
        config: TrainConfig,
        folder: RunFolder,
        devices: Devices,
    ) -> None:
        self.arm, self.config, self.out, self.devices = arm, config, folder.path, devices
        base = handle.loaded
        self.requests = requests
        texts = texts_of(base, requests, folder, config)
        if not devices.first:
            devices.wait()  # the first process makes the replies
        self.adapted = Adapted(base, config, blocks=arm.blocks(config, base.n_layers))
        forward = Forward(base, precision=config.precision)
        forward.decide([texts.example(*pair) for pair in PROBE])
        self.clock = Clock()
        assert arm.method is not None
        self.method: Method = arm.method(
            Bench(self.adapted, forward, texts, devices, self.clock, config), config
        )
        if devices.first:
            devices.wait()
        self.optimiser = torch.optim.AdamW(
            self.adapted.parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.losses: list[dict[str, float]] = []
        self.seconds: list[dict[str, float]] = []

    def restore(self, state: Row) -> None:
        """Go on from a saved state.

        Raises:
            AttackPlaneError: it is not one of this training.
        """
        try:
            self.adapted.restore(state["adapter"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.method.restore(state["method"])
        except Exception as error:  # what does not fit stops in any way
            raise AttackPlaneError(
                "the saved state does not fit this training",
                where=self.out / STATE,
                got=f"{type(error).__name__}: {str(error)[:100]}",
                remedy="remove the file to train anew, or choose another --out",
            ) from error
        self.losses, self.seconds = state["losses"], state["seconds"]

    def go_on(self, save_every: int) -> None:
        """The updates that are left, with checkpoints on the way."""
        n, saved = self.config.num_steps, self.config.saved_steps
        self.adapted.tuned.train()
        bar = progress_bar(n, self.arm.name, "update", leave=None, initial=len(self.losses))
        with bar:
            for step in range(len(self.losses), n):
                row = self.update(step)
                bar.update(1)
                bar.set_postfix_str(", ".join(f"{k} {v:.3f}" for k, v in _told(row).items()))
                if not self.devices.first:
                    continue
                track(f"train/{self.arm.name}", step + 1, _told(row))
                if step + 1 in saved:
                    self.adapted.save(self.out / f"step-{step + 1}", self.card(step + 1))
                if step + 1 in saved or (step + 1) % save_every == 0 or step + 1 == n:
                    self.save()

    def update(self, step: int) -> dict[str, float]:
        """One optimiser step; what it logged."""
        count, clock = self.config.accumulation, self.clock
        clock.seconds = {}
        parts: dict[str, float] = {}
        micro_batches = range(step * count, (step + 1) * count)
        with clock.time("total"):
            for micro in self.devices.share(micro_batches):
                torch.manual_seed(stream_seed(self.config.seed, micro))
                for name, value in self._learnt(micro):
                    parts[name] = parts.get(name, 0.0) + value / count
            everyones = self.devices.everyones([parts])
            parts = {name: sum(own[name] for own in everyones) for name in parts}
            parameters = self.adapted.parameters
            self.devices.add_up(parameters)
            norm = self._norm(step, parts)
            with clock.time("optimiser"):
                rate = self.config.rate(step)
                for group in self.optimiser.param_groups:
                    group["lr"] = rate
                self.optimiser.step()
                self.optimiser.zero_grad()
                self.adapted.loaded.weights_changed()
                if not all(bool(p.isfinite().all()) for p in parameters):
                    raise self._not_finite(step, "the weights are not finite", parts, norm)
            extra = self.method.after_update(step + 1)
        loss = sum(parts.values())
        row = {"step": step + 1, **parts, "loss": loss, **extra}
        row |= {"gradient_norm": norm, "learning_rate": rate}
        self.losses.append(row)
        peak = peak_mib(self.adapted.loaded.device)
        self.seconds.append({"step": step + 1, **clock.seconds, PEAK: round(peak or 0.0)})
        return row

    def _learnt(self, micro: int) -> Iterator[tuple[str, float]]:
        """Gradients of one micro-batch, graph by graph; its components and their values."""
        for losses in self.method.losses(micro):
            with self.clock.time("backward"):
                total = torch.stack(list(losses.values())).sum()
                if total.requires_grad:
                    (total / self.config.accumulation).backward()
            yield from ((name, float(value.detach())) for name, value in losses.items())

    def _norm(self, step: int, parts: dict[str, float]) -> float:
        """The gradient's norm, which is clipped if asked.

        Raises:
            AttackPlaneError: a loss or the gradient is not finite.
        """
        most = self.config.max_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.adapted.parameters, most))
        if not math.isfinite(norm) or not all(map(math.isfinite, parts.values())):
            raise self._not_finite(step, "the training loss is not finite", parts, norm)
        return norm

    def _not_finite(
        self, step: int, what: str, parts: dict[str, float], norm: float
    ) -> AttackPlaneError:
        told = ", ".join(f"{k} {v:.3g}" for k, v in parts.items())
        return AttackPlaneError(
            f"{what}; no checkpoint of this update is saved",
            where=f"{self.out}, step {step + 1}",
            got=f"{told}, gradient norm {norm:.3g}",
            remedy="lower the learning rate, clip the gradient, or use float32",
        )

    # --- saving -----------------------------------------------------------------------------------
    def card(self, step: int) -> Row:
        return card(self.arm, self.adapted.loaded, self.config, self.requests, step)

    def save(self) -> None:
        """All that the next update depends on, and what was logged."""
        save_state(
            self.out,
            {
                "adapter": self.adapted.weights(),
                "optimiser": self.optimiser.state_dict(),
                "method": self.method.state(),
                "losses": self.losses,
                "seconds": self.seconds,
            },
        )


def card(arm: Arm, base: LoadedModel, config: Any, requests: Requests, step: int) -> Row:
    """What a checkpoint says of itself."""
    return {
        "arm": arm.name,
        "base": base.fingerprint,
        "step": step,
        "seed": config.seed,
        "settings": content_hash(settings_of(arm, config, requests)),
        "method": method_of(arm, config, requests),
        "variant": variant_of(arm, config),
        "common": common_of(config),
        "trained_on": sorted(request_hash(r) for r in requests.texts(arm.needs, arm.validates)),
    }


def _told(row: dict[str, float]) -> dict[str, float]:
    """What the progress bar shows of a row."""
    return {k: v for k, v in row.items() if k not in ("step", "gradient_norm", "learning_rate")}
