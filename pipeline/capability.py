"""What a model can still do, and what its training changed inside; kept by what it depends on.

instructions  share of verifiable instructions that pass (``evaluation/instructions.py``)
kl            KL(base || model) on the base's replies to harmless requests
perplexity    of held-out prose
outside       share of the change of states that lies outside the base's H-R plane, mean over
              inner layers, at t_inst and t_post_inst (``geometry/change.py``)
tasks         scores of lm-evaluation-harness (extra ``capability``)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.conversation import Conversation
from core.errors import AttackPlaneError, nearest
from core.generate import complete
from core.kept import Kept
from core.models import LoadedModel, ModelHandle
from core.prompt import Renderer
from core.records import HARMFUL, HARMLESS
from core.rows import Row
from core.served import Question
from core.statistics import wilson
from core.store import RunFolder
from evaluation.behaviours import CONTRAST_SPLITS, HELD_OUT_SPLITS, load_behaviours, spread
from evaluation.budget import EvaluateConfig
from evaluation.instructions import Instruction, instructions, paragraphs
from evaluation.likeness import Reference, kl_to, perplexity, reference
from geometry.activations import collect
from geometry.change import null_outside, share_outside
from geometry.contrasts import between
from geometry.layers import inner_layers

KEPT = "capability.jsonl"
INSTRUCTION_TOKENS, KL_TOKENS = 96, 24
POSITIONS = ("t_inst", "t_post_inst")
CHANGE_PROMPTS = 20
"""Held-out prompts of each label, for the change inside."""


class Measures:
    """The measurements of one evaluation.

    Args:
        base: what KL and change are measured from.
        tasks: of lm-evaluation-harness; ``task_limit``: examples of each.
    """

    def __init__(
        self,
        run: RunFolder,
        base: ModelHandle,
        config: EvaluateConfig,
        tasks: Sequence[str] = (),
        task_limit: int | None = None,
    ) -> None:
        self.base, self.config, self.tasks, self.task_limit = base, config, tasks, task_limit
        self.kept = Kept(run, KEPT)

    def of(self, handle: ModelHandle) -> Row:
        """All measurements of one model that can be made, from the run where it has them."""
        config = self.config
        values: Row = {}
        if config.instructions:
            chosen = _every(instructions(), config.instructions)
            about = [[i.id, i.instruction, i.check, i.value] for i in chosen]
            values |= dict(
                self.kept.get("instructions", handle, about, lambda: followed(handle, chosen))
            )
        if handle.server:  # the rest takes weights
            return values
        values |= self._kept("perplexity", handle, paragraphs(), _read_prose)
        own: list[Any] = [self.base.fingerprint, config.kl_prompts, KL_TOKENS]
        if config.kl_prompts:
            values |= self._kept(
                "kl", handle, own, lambda m: {"kl": kl_to(self.reference, Renderer(m))}
            )
        inside = [self.base.fingerprint, self._changed_on]
        values |= self._kept("outside", handle, inside, self._outside)
        for task in self.tasks:
            measure = partial(harness, task=task, limit=self.task_limit)
            file = Path(task).read_text() if Path(task).is_file() else ""
            scores = self._kept("task", handle, [task, file, self.task_limit], measure)
            values.setdefault("tasks", {})[task] = scores
        return values

    def _kept(
        self, what: str, handle: ModelHandle, about: Any, measure: Callable[[LoadedModel], Row]
    ) -> Row:
        return dict(self.kept.get(what, handle, about, lambda: measure(handle.loaded)))

    # --- against the base -------------------------------------------------------------------------
    @cached_property
    def reference(self) -> Reference:
        renderer = Renderer(self.base.loaded)
        chosen = spread(
            load_behaviours(label=HARMLESS, splits=HELD_OUT_SPLITS), self.config.kl_prompts
        )
        prompts = [renderer.text(Conversation.build(b.request)) for b in chosen]
        replies = complete(
            renderer, prompts, max_new_tokens=KL_TOKENS, description="the base's replies"
        )
        return reference(renderer, prompts, replies, KL_TOKENS)

    @cached_property
    def _plane(self) -> tuple[Tensor, Tensor]:
        """(layer, d_model) harmfulness and refusal directions of the base."""
        sides = [
            states(
                self.base.loaded,
                [b.request for b in load_behaviours(label=label, splits=CONTRAST_SPLITS)],
            )
            for label in (HARMFUL, HARMLESS)
        ]
        harmful, harmless = sides
        harm, refusal = (
            between(harmful[:, :, k], harmless[:, :, k]).direction for k in range(len(POSITIONS))
        )
        return harm, refusal

    @cached_property
    def _unchanged(self) -> Tensor:
        return states(self.base.loaded, self._changed_on)

    @cached_property
    def _changed_on(self) -> list[str]:
        """Held-out requests on which the change inside is measured."""
        return [
            b.request
            for label in (HARMFUL, HARMLESS)
            for b in spread(load_behaviours(label=label, splits=HELD_OUT_SPLITS), CHANGE_PROMPTS)
        ]

    def _outside(self, loaded: LoadedModel) -> Row:
        if (loaded.n_layers, loaded.d_model) != (
            self.base.loaded.n_layers,
            self.base.loaded.d_model,
        ):
            return {"outside": None, "outside_null": None, "change": None}
        change = states(loaded, self._changed_on) - self._unchanged
        layers = list(inner_layers(loaded.n_layers))
        shares = [share_outside(change[:, :, k], *self._plane)[layers] for k in (0, 1)]
        mean = float(torch.stack(shares).nanmean())
        size = change[:, layers].norm(dim=-1) / self._unchanged[:, layers].norm(dim=-1)
        return {
            "outside": None if math.isnan(mean) else mean,
            "outside_null": null_outside(loaded.d_model),
            "change": float(size.mean()),
        }


def states(loaded: LoadedModel, requests: Sequence[str]) -> Tensor:
    """(prompt, layer, position, d_model) residuals at t_inst and t_post_inst."""
    renderer = Renderer(loaded)
    prompts = [renderer.render(Conversation.build(request)) for request in requests]
    return collect(loaded, prompts, list(requests), positions=POSITIONS).resid


def _read_prose(loaded: LoadedModel) -> Row:
    per_token, bits = perplexity(Renderer(loaded), paragraphs())
    return {"perplexity": per_token, "bits_per_character": bits}


def _every(chosen: Sequence[Instruction], count: int) -> list[Instruction]:
    """``count`` of them, evenly spaced, so that every kind is there."""
    n = min(count, len(chosen))
    return [chosen[i * len(chosen) // n] for i in range(n)]


def followed(model: ModelHandle, chosen: Sequence[Instruction]) -> Row:
    """Share of instructions whose reply passes, with Wilson's interval, and by kind."""
    replies = _replies(model, [i.instruction for i in chosen])
    passed = [
        i.passed(reply, cut=length >= INSTRUCTION_TOKENS - 1)
        for i, (reply, length) in zip(chosen, replies, strict=True)
    ]
    by_kind: dict[str, list[bool]] = {}
    for i, ok in zip(chosen, passed, strict=True):
        by_kind.setdefault(i.kind, []).append(ok)
    return {
        "instructions": sum(passed) / len(passed),
        "instructions_n": len(passed),
        "instructions_wilson": wilson(sum(passed), len(passed)),
        "instructions_by_kind": {k: sum(v) / len(v) for k, v in by_kind.items()},
    }


def _replies(model: ModelHandle, requests: Sequence[str]) -> list[tuple[str, int]]:
    """A reply to each request, and its length in tokens."""
    if model.server:
        questions = [Question([("user", text)], INSTRUCTION_TOKENS) for text in requests]
        answers = model.server.answers(questions)
        return [(answer.text, answer.reply_tokens or 0) for answer in answers]
    renderer = Renderer(model.loaded)
    prompts = [renderer.text(Conversation.build(text)) for text in requests]
    replies = complete(
        renderer, prompts, max_new_tokens=INSTRUCTION_TOKENS, description="instructions"
    )
    lengths = map(len, renderer.tokenise(replies))
    return list(zip(replies, lengths, strict=True))


def require_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that are not there, before hours of work.

    Raises:
        AttackPlaneError: lm-evaluation-harness is missing, or knows no such task; a file that is no
            text.
    """
    if not tasks:
        return
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AttackPlaneError(
            "tasks need the package lm-eval", remedy="pip install 'attack-plane[capability]'"
        ) from error
    names = set(TaskManager().all_tasks)
    for task in tasks:
        path = Path(task)
        if path.is_file():
            try:
                path.read_text(encoding="utf-8")
            except ValueError as error:
                raise AttackPlaneError("not a task's file", where=path, got=error) from error
        elif task not in names:
            remedy = nearest(task, names) if names else None
            raise AttackPlaneError("no such task", where="--task", got=task, remedy=remedy)


def harness(loaded: LoadedModel, task: str, limit: int | None) -> Row:
    """Scores of one task of lm-evaluation-harness on the loaded model: metric -> value.

    ``task`` is a task's name, or the path of a task's YAML file.

    A model with a hook has no scores: the harness pads batches in ways that a hook cannot see.

    Raises:
        AttackPlaneError: the task cannot be run.
    """
    if loaded.hook:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    try:
        own = copy.deepcopy(loaded.tokenizer)  # it may be given a pad token
        model = HFLM(pretrained=loaded.model, tokenizer=own, batch_size=8)
        found = simple_evaluate(
            model=model, tasks=[task], limit=limit, task_manager=TaskManager(), bootstrap_iters=0
        )
    except Exception as error:  # the harness raises errors of many libraries
        raise AttackPlaneError(
            "the task cannot be run", where=f"lm-evaluation-harness, {task}", got=str(error)[:300]
        ) from error
    assert found is not None
    scores = next(iter(found["results"].values()))
    return {  # keys are "metric,filter"; what else stands there is about the examples
        k: v
        for k, v in scores.items()
        if "," in k and "stderr" not in k and isinstance(v, (int, float))
    }
