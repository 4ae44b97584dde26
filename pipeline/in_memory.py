"""The stages without a run folder: what the Python API stands on.

Prompts come as results, artifacts, behaviours or texts; what is found comes back as rows. A model
is put into evaluation mode while it is used, and left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attacks.registry import find_attack
from attacks.result import AttackResult, prompt_result
from attacks.workbench import Progress, Task, Workbench
from core.errors import AttackPlaneError
from core.generate import complete
from core.models import LoadedModel, evaluating, handle_of
from core.prompt import Conversation, Prompt, Renderer
from core.records import PLAIN, AttackArtifact, Behaviour, Directions, PlanePoint
from evaluation.judges import Exchange, Judge, make_judge, refusals
from geometry.activations import collect
from geometry.directions import EstimateConfig, best_layers, estimate
from geometry.plane import PromptInfo, points
from pipeline.contrast_reading import rendered
from transfer.replay import ReplayConfig, replay

REPLY_TOKENS = 32
"""Of the replies that say refused or accepted."""


@dataclass(frozen=True)
class ModelDirections:
    """Directions of one model, with the model.

    ``harmfulness`` and ``refusal`` are (n_layers + 1, d_model) unit vectors that point towards
    harmful and towards refused. ``statistics`` has intervals and nulls; see
    ``geometry/directions.py``.
    """

    model: LoadedModel
    directions: Directions

    @property
    def harmfulness(self) -> Tensor:
        return self.directions.harmfulness

    @property
    def refusal(self) -> Tensor:
        return self.directions.refusal

    @property
    def statistics(self) -> dict[str, Tensor]:
        return self.directions.statistics

    @property
    def layer(self) -> int:
        """The layer with the best layer score."""
        return best_layers(self.directions)[0]


def run_attack(
    name: str,
    request: str | Behaviour,
    target: str | None,
    source: LoadedModel | None,
    config: Any,
    seed: int,
    on_step: Callable[[Progress], None] | None,
) -> list[AttackResult]:
    """Run one attack of the registry on one request."""
    attack, fixed = find_attack(name)
    behaviour = behaviour_of(request, target)
    if attack.sources != "none" and source is None:
        raise AttackPlaneError(f"{name} needs a source model", remedy="give source=ap.load(...)")
    if attack.needs_target and not behaviour.target_string:
        raise AttackPlaneError(
            f"{name} needs a target string", remedy="say how the reply should begin, with target="
        )
    made = config or attack.make_config(fixed, where=name)
    sources = [handle_of(source)] if source and attack.sources != "none" else []
    task = Task(behaviour, on_step=on_step or (lambda progress: None))
    with Workbench(sources, [behaviour], seed) as bench:
        attack.check(bench, made)
        if source is None:
            return list(attack.run(bench, task, made))
        with evaluating(source):
            return list(attack.run(bench, task, made))


def behaviour_of(request: str | Behaviour, target: str | None = None) -> Behaviour:
    """A request as a behaviour; ``target`` wins over its own target string."""
    if isinstance(request, str):
        return Behaviour("request", request, target, "none", "harmful", "none")
    return replace(request, target_string=target) if target else request


def judge_of(judge: str | Judge) -> Judge:
    return make_judge(judge) if isinstance(judge, str) else judge


def artifact_of(prompt: Any, number: int) -> AttackArtifact:
    """Anything that may stand for a prompt, as an artifact whose id is its number.

    Raises:
        AttackPlaneError: something that is no prompt.
    """
    if isinstance(prompt, AttackArtifact):
        return replace(prompt, artifact_id=str(number))
    behaviour_id = prompt.behaviour_id if isinstance(prompt, Behaviour) else ""
    if isinstance(prompt, str):
        prompt = behaviour_of(prompt)
    if isinstance(prompt, Behaviour):
        prompt = prompt_result(prompt, PLAIN, prompt.request)
    if not isinstance(prompt, AttackResult):
        raise AttackPlaneError(
            "not a prompt",
            where=f"prompt {number}",
            got=type(prompt).__name__,
            remedy="give results, artifacts, behaviours or texts",
        )
    return AttackArtifact(
        artifact_id=str(number),
        behaviour_id=behaviour_id or prompt.request,
        seed=0,
        config_hash="",
        **prompt.to_row(),
    )


def replayed(
    prompts: Sequence[Any],
    target: LoadedModel,
    judges: Sequence[str | Judge],
    config: ReplayConfig,
) -> list[dict[str, Any]]:
    """One row per prompt, in their order: the reply and what the judges say."""
    made = [judge_of(judge) for judge in judges]
    artifacts = [artifact_of(prompt, n) for n, prompt in enumerate(prompts)]
    with evaluating(target):
        batches = list(replay(target, artifacts, made, config))
    records = {record.artifact_id: record for batch in batches for record in batch}
    return [
        {
            "attack": a.attack,
            "request": a.request,
            "prompt": a.prompt,
            "target_model": records[a.artifact_id].target_model,
            "reply": records[a.artifact_id].reply,
            "jailbroken": records[a.artifact_id].jailbroken,
            **records[a.artifact_id].judgements,
        }
        for a in artifacts
    ]


def estimated(
    model: LoadedModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    estimator: str,
    judge: str | Judge,
    config: EstimateConfig,
    system_prompt: str | None,
) -> Directions:
    """Directions of one model from two sets of requests."""
    sides = [(text, "harmful") for text in harmful] + [(text, "harmless") for text in harmless]
    requests = [
        Behaviour(str(n), text, None, "none", label, "none")
        for n, (text, label) in enumerate(sides)
    ]
    with evaluating(model):
        prompts = rendered(Renderer(model), requests, system_prompt)
        refused = None
        if estimator == "zhao":
            refused = refused_by(model, requests, prompts, judge_of(judge))
        read = collect(model, prompts, [b.behaviour_id for b in requests])
    labels = [b.label == "harmful" for b in requests]
    directions = estimate(read, labels, estimator=estimator, refused=refused, config=config)
    directions.settings["system_prompt"] = system_prompt
    return directions


def refused_by(
    model: LoadedModel, requests: Sequence[Behaviour], prompts: Sequence[Prompt], judge: Judge
) -> list[bool | None]:
    """Whether the model's own greedy reply to each request refused."""
    texts = [prompt.text for prompt in prompts]
    replies = complete(Renderer(model), texts, max_new_tokens=REPLY_TOKENS, batch_size=32)
    pairs = zip(requests, replies, strict=True)
    return refusals(judge, [Exchange(b.request, reply) for b, reply in pairs])


def projected(
    prompts: Sequence[Any],
    model: LoadedModel,
    own: Directions,
    base: Directions,
    layer: int,
    jailbroken: Sequence[bool | None] | None,
    with_plain: bool,
) -> list[PlanePoint]:
    """Points of the prompts in both frames; a behaviour is an anchor of its label."""
    artifacts = [artifact_of(prompt, n) for n, prompt in enumerate(prompts)]
    verdicts = list(jailbroken or [None] * len(artifacts))
    labels = [p.label if isinstance(p, Behaviour) else None for p in prompts]
    if with_plain:
        have = {a.request for a in artifacts if a.attack == PLAIN}
        wanted = dict.fromkeys(a.request for a in artifacts if a.attack != PLAIN)
        extra = [request for request in wanted if request not in have]
        artifacts += [artifact_of(request, len(artifacts) + n) for n, request in enumerate(extra)]
        verdicts += [None] * len(extra)
        labels += [None] * len(extra)
    renderer = Renderer(model)
    infos, texts = [], []
    for artifact, verdict, label in zip(artifacts, verdicts, labels, strict=True):
        conversation = Conversation.of_prompt(
            artifact.prompt,
            request=artifact.request,
            suffix=artifact.suffix,
            system=artifact.system_prompt,
        )
        texts.append(renderer.render(conversation, allow_trim=True))
        infos.append(_info(artifact, verdict, label))
    with evaluating(model):
        read = collect(model, texts, [info.prompt_id for info in infos])
    return points(read, infos, own, base, layer)


def _info(artifact: AttackArtifact, verdict: bool | None, label: str | None) -> PromptInfo:
    return PromptInfo(
        prompt_id=artifact.artifact_id,
        behaviour_id=artifact.request,
        kind="anchor" if label else "attack",
        class_name=f"{label} (anchor)" if label else artifact.attack,
        label=label or "harmful",
        attack="none" if label else artifact.attack,
        source="none" if label else artifact.source_model,
        jailbroken=verdict,
        system=artifact.system_prompt,
    )
