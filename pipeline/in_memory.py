"""The stages without a run folder: what the Python API stands on.

Prompts come as results, artifacts, behaviours or texts, and results come back as rows. A model is
put into evaluation mode while it is used, and left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attacks.result import AttackResult, prompt_result
from core.errors import AttackPlaneError
from core.generate import complete
from core.models import LoadedModel, evaluating
from core.progress import OnProgress, reporting
from core.progress import bar as progress_bar
from core.prompt import Conversation, Prompt, Renderer
from core.readings import Directions, PlanePoint
from core.records import HARMFUL, PLAIN, AttackArtifact, Behaviour, Replay
from core.rows import Row
from core.served import Server
from evaluation.judges import DEFAULT_JUDGE, QUICK_JUDGE, Exchange, Judge, make_judge, refusals
from geometry.activations import collect
from geometry.classes import describe_classes
from geometry.directions import EstimateConfig, best_layers, estimate
from geometry.plane import PromptInfo, points
from pipeline.attack_in_memory import behaviour_of, listed
from pipeline.contrast_reading import rendered
from plots import plane_png
from transfer.replay import ReplayConfig, sendings
from transfer.served import replies_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPLY_TOKENS = 32
"""Of the replies that say refused or accepted."""


@dataclass(frozen=True)
class ModelDirections:
    """Directions of one model, with the model.

    Attributes:
        model: the model that they were estimated on.
        estimate: the directions as the stages of a run keep them.
    """

    model: LoadedModel
    estimate: Directions

    @property
    def harmfulness(self) -> Tensor:
        """(n_layers + 1, d_model) unit vectors that point towards harmful, read at t_inst."""
        return self.estimate.harmfulness

    @property
    def refusal(self) -> Tensor:
        """(n_layers + 1, d_model) unit vectors that point towards refusal, read at t_post_inst."""
        return self.estimate.refusal

    @property
    def harmfulness_norm(self) -> Tensor:
        """(n_layers + 1,) distance of the two class means, in units of the residual."""
        return self.estimate.harmfulness_norm

    @property
    def refusal_norm(self) -> Tensor:
        """(n_layers + 1,) distance of the two class means, in units of the residual."""
        return self.estimate.refusal_norm

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Scores, cosines, intervals and nulls by name, each with the layer as first dimension."""
        return self.estimate.statistics

    @property
    def layer(self) -> int:
        """The layer with the best layer score."""
        return best_layers(self.estimate)[0]


def judge_of(judge: str | Judge | None) -> Judge:
    judge = QUICK_JUDGE if judge is None else judge
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
    target: LoadedModel | Server,
    judges: Sequence[str | Judge] | str | None,
    config: ReplayConfig,
    system_prompt: str | None,
    on_progress: OnProgress | None,
) -> list[Row]:
    """One row per prompt, in their order: the reply and what the judges say."""
    judges = DEFAULT_JUDGE if judges is None else judges
    made = [judge_of(judge) for judge in ([judges] if isinstance(judges, str) else judges)]
    entries = [_entry(p, n, system_prompt) for n, p in enumerate(listed(prompts, "prompts"))]
    artifacts = [artifact for artifact, _ in entries]
    batches: list[list[Replay]] = []
    here = nullcontext() if isinstance(target, Server) else evaluating(target)
    with here, reporting(on_progress):
        sent = sendings(artifacts, config)
        bar = progress_bar(len(sent), "replies", "reply")
        with bar, reporting(None):  # one count over all batches
            for batch in replies_of(target, sent, made, config):
                batches.append(batch)
                bar.update(len(batch))
    records = {(r.artifact_id, r.sample): r for batch in batches for r in batch}
    shown = [(s.artifact, records[s.artifact.artifact_id, s.sample]) for s in sent]
    shown.sort(key=lambda pair: int(pair[0].artifact_id))  # all replies to a prompt together
    return [
        {
            "attack": artifact.attack,
            "request": artifact.request,
            "prompt": artifact.prompt,
            "target_model": record.target_model,
            "reply": record.reply,
            "outcome": record.outcome,
            "jailbroken": record.jailbroken,
            "d": record.d,
            **record.judgements,
        }
        for artifact, record in shown
    ]


def estimated(
    model: LoadedModel,
    harmful: Sequence[str | Behaviour],
    harmless: Sequence[str | Behaviour],
    estimator: str,
    judge: str | Judge | None,
    config: EstimateConfig,
    system_prompt: str | None,
    on_progress: OnProgress | None,
) -> Directions:
    """Directions of one model from two sets of requests."""
    sides = {"harmful": listed(harmful, "requests"), "harmless": listed(harmless, "requests")}
    pairs = [(label, behaviour_of(item)) for label, side in sides.items() for item in side]
    requests = [replace(b, behaviour_id=str(n), label=label) for n, (label, b) in enumerate(pairs)]
    with evaluating(model), reporting(on_progress):
        prompts = rendered(Renderer(model), requests, system_prompt)
        refused = None
        if estimator == "zhao":
            refused = refused_by(model, requests, prompts, judge_of(judge))
        read = collect(model, prompts, [b.behaviour_id for b in requests])
    labels = [b.label == HARMFUL for b in requests]
    directions = estimate(
        read,
        labels,
        estimator=estimator,
        refused=refused,
        units=[b.unit for b in requests],
        config=config,
    )
    directions.settings["system_prompt"] = system_prompt
    return directions


def refused_by(
    model: LoadedModel, requests: Sequence[Behaviour], prompts: Sequence[Prompt], judge: Judge
) -> list[bool | None]:
    """Whether the model's own greedy reply to each request refused."""
    texts = [prompt.text for prompt in prompts]
    replies = complete(Renderer(model), texts, max_new_tokens=REPLY_TOKENS)
    pairs = zip(requests, replies, strict=True)
    return refusals(judge, [Exchange(b.request, reply) for b, reply in pairs])


def projected(
    prompts: Sequence[Any],
    directions: ModelDirections,
    base: ModelDirections,
    layer: int,
    jailbroken: Sequence[bool | None] | None,
    with_plain: bool,
    on_progress: OnProgress | None,
) -> list[PlanePoint]:
    """Points of the prompts in both frames; a behaviour is an anchor of its label."""
    system = base.estimate.settings.get("system_prompt")
    entries = [_entry(prompt, n, system) for n, prompt in enumerate(listed(prompts, "prompts"))]
    verdicts = [None] * len(entries) if jailbroken is None else list(jailbroken)
    if len(verdicts) != len(entries):
        raise AttackPlaneError(
            "jailbroken has another length than prompts",
            got=f"{len(verdicts)} verdicts for {len(entries)} prompts",
        )
    if with_plain:
        artifacts = [a for a, label in entries if label is None]
        have = {(a.request, a.system_prompt) for a in artifacts if a.attack == PLAIN}
        wanted = dict.fromkeys((a.request, a.system_prompt) for a in artifacts)
        for request, own in wanted:
            if (request, own) not in have:
                entries.append(_entry(request, len(entries), own))
                verdicts.append(None)
    model = directions.model
    renderer = Renderer(model)
    infos, texts = [], []
    for (artifact, label), verdict in zip(entries, verdicts, strict=True):
        conversation = Conversation.of_prompt(
            artifact.prompt,
            request=artifact.request,
            suffix=artifact.suffix,
            system=artifact.system_prompt,
        )
        texts.append(renderer.render(conversation, allow_trim=True))
        infos.append(_info(artifact, verdict, label))
    with evaluating(model), reporting(on_progress):
        read = collect(model, texts, [info.prompt_id for info in infos])
    return points(read, infos, directions.estimate, base.estimate, layer)


def _entry(prompt: Any, number: int, system: str | None) -> tuple[AttackArtifact, str | None]:
    """A prompt, and the label of an anchor. What is no attack gets this system prompt."""
    artifact = artifact_of(prompt, number)
    if isinstance(prompt, (str, Behaviour)):
        artifact = replace(artifact, system_prompt=system)
    return artifact, prompt.label if isinstance(prompt, Behaviour) else None


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


def plane_figure(rows: Any) -> Figure:
    """The picture of rows of ``projected``, or of a pandas frame of them (its NaN is None)."""
    if hasattr(rows, "to_dict"):
        rows = rows.to_dict("records")
    known = [{k: None if v != v else v for k, v in row.items()} for row in rows]
    read = [PlanePoint.from_row(row) for row in known]
    return plane_png.figure_of(known, describe_classes(read))
