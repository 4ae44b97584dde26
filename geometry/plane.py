"""Projects prompts onto the (harmfulness, refusal) plane.

    x = (h[t_inst]      - harmless centroid at t_inst)      . harmfulness direction      at one
                        layer
    y = (h[t_post_inst] - harmless centroid at t_post_inst) . refusal direction

Under attack the last token of the content is a wrapper's or a suffix's. At t_goal, the last token
of the request, x can be read instead; on plain requests the two are one.

Frame ``own``: directions and centroids of the model that read the prompt. Frame ``base``: those of
one reference model, so that movement between checkpoints shows. More of x is more harmful, more of
y more refusing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.readings import Activations, Directions, PlanePoint
from core.records import PLAIN
from geometry.contrasts import unit
from geometry.resampling import upper


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """What a point says about its prompt besides where it lies."""

    prompt_id: str
    behaviour_id: str
    kind: str
    class_name: str
    label: str
    attack: str
    source: str
    jailbroken: bool | None
    system: str | None = None


def project(resid: Tensor, direction: Tensor, centroid: Tensor) -> tuple[Tensor, Tensor]:
    """(prompt, d_model) -> dot products of the centred residual, cosines of the uncentred one."""
    resid, direction = resid.double(), direction.double()
    dot = (resid - centroid.double()) @ direction
    return dot, (resid @ direction) / (resid.norm(dim=-1) * direction.norm()).clamp_min(1e-12)


def plain_requests(infos: Sequence[PromptInfo]) -> list[int | None]:
    """For each attacked prompt the index of its behaviour's plain request.

    It is the one from the prompt's own source, else any, since it is the same prompt; the system
    prompt must be the same. None for plain requests, anchors, and behaviours without one.
    """
    plain = [(n, i) for n, i in enumerate(infos) if i.attack == PLAIN]
    own = {(i.source, i.behaviour_id, i.system): n for n, i in plain}
    any_source = {(i.behaviour_id, i.system): n for n, i in reversed(plain)}
    return [
        own.get((i.source, i.behaviour_id, i.system), any_source.get((i.behaviour_id, i.system)))
        if i.kind == "attack" and i.attack != PLAIN
        else None
        for i in infos
    ]


def require_one_frame(own: Directions, base: Directions, layer: int) -> None:
    """Whether both models' directions are of one size and have this layer.

    Raises:
        AttackPlaneError: they are not, or have not.
    """
    if own.harmfulness.shape != base.harmfulness.shape:
        raise AttackPlaneError(
            "the base frame is of another size",
            where=f"{base.model} and {own.model}",
            got=f"{tuple(base.harmfulness.shape)} and {tuple(own.harmfulness.shape)}",
            remedy="give as base a checkpoint of the same architecture",
        )
    if not 0 <= layer <= own.n_layers:
        raise AttackPlaneError("no such layer", got=layer, remedy=f"0 to {own.n_layers}")


def points(
    activations: Activations,
    infos: Sequence[PromptInfo],
    own: Directions,
    base: Directions,
    layer: int,
    *,
    position: str = "t_inst",
    wrappers: Mapping[int, tuple[int, int]] | None = None,
) -> list[PlanePoint]:
    """Points of all prompts in both frames, frame by frame, in the order of ``infos``.

    Args:
        activations: of the prompts of ``infos``, and others after them, with this layer.
        position: where x is read, t_inst or t_goal. A prompt that has no t_goal has no point.
        wrappers: prompt -> (the same wrapper with a harmless request in it, that request plain),
            as numbers of rows of ``activations``.
    """
    require_one_frame(own, base, layer)
    cosines = {
        name: float(getattr(own, name)[layer] @ getattr(base, name)[layer])
        for name in ("harmfulness", "refusal")
    }
    rows = []
    for frame, directions in (("base", base), ("own", own)):
        h, r = directions.harmfulness[layer], directions.refusal[layer]
        centre = directions.harmless_t_inst[layer]
        x, x_cosine = project(activations.of(layer, position), h, centre)
        x_goal, _ = project(activations.of(layer, "t_goal"), h, centre)
        refused_from = directions.harmless_t_post_inst[layer]
        y, y_cosine = project(activations.of(layer, "t_post_inst"), r, refused_from)
        for i, (info, plain) in enumerate(zip(infos, plain_requests(infos), strict=True)):
            if np.isnan(float(x[i])):
                continue
            goal = float(x_goal[i])
            wrapped = (wrappers or {}).get(i)
            rows.append(
                PlanePoint(
                    prompt_id=info.prompt_id,
                    behaviour_id=info.behaviour_id,
                    kind=info.kind,
                    class_name=info.class_name,
                    label=info.label,
                    attack=info.attack,
                    source=info.source,
                    target=activations.model,
                    frame=frame,
                    layer=layer,
                    x=float(x[i]),
                    y=float(y[i]),
                    x_cosine=float(x_cosine[i]),
                    y_cosine=float(y_cosine[i]),
                    x_t_goal=None if np.isnan(goal) else goal,
                    cos_base_own_harmfulness=cosines["harmfulness"],
                    cos_base_own_refusal=cosines["refusal"],
                    jailbroken=info.jailbroken,
                    plain_x=None if plain is None else float(x[plain]),
                    plain_y=None if plain is None else float(y[plain]),
                    wrapper_x=float(x[wrapped[0]] - x[wrapped[1]]) if wrapped else None,
                    wrapper_y=float(y[wrapped[0]] - y[wrapped[1]]) if wrapped else None,
                    position=position,
                )
            )
    return rows


Nulls = dict[tuple[str, str, str], dict[str, list[float]]]


def displacement_nulls(
    activations: Activations,
    infos: Sequence[PromptInfo],
    own: Directions,
    base: Directions,
    layer: int,
    *,
    draws: int = 2000,
    position: str = "t_inst",
) -> Nulls:
    """How far each class would seem to move along directions that mean nothing.

    The mean displacement of a class from its plain requests is projected on random unit vectors and
    on the directions that permuted labels gave
    (``Directions.statistics["null_permuted_directions_*"]``); kept is the 95th percentile of the
    absolute value, by (target, frame, class): {"null_random": [x, y], "null_permuted": [x, y]}.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(draws, activations.resid.shape[-1], generator=generator)
    random = unit(random)
    read = ~activations.of(layer, position).isnan().any(-1)
    pairs: dict[str, list[tuple[int, int, str]]] = {}
    for n, (info, start) in enumerate(zip(infos, plain_requests(infos), strict=True)):
        if start is not None and read[n]:
            pairs.setdefault(info.class_name, []).append((n, start, info.behaviour_id))
    nulls: Nulls = {}
    for name, members in pairs.items():
        attacked, begun = (torch.tensor([member[side] for member in members]) for side in (0, 1))
        count = Counter(
            member[2] for member in members
        )  # each behaviour counts once, as in describe_classes
        weights = torch.tensor([1 / count[member[2]] / len(count) for member in members])
        for frame, directions in (("base", base), ("own", own)):
            ends: dict[str, list[float]] = {"null_random": [], "null_permuted": []}
            for where, axis in ((position, "harmfulness"), ("t_post_inst", "refusal")):
                resid = activations.of(layer, where)
                moved = (weights[:, None] * (resid[attacked] - resid[begun])).sum(0)
                permuted = directions.statistics[f"null_permuted_directions_{axis}"][:, layer]
                for key, vectors in (("null_random", random), ("null_permuted", permuted)):
                    ends[key].append(float(upper(vectors @ moved)))
            nulls[activations.model, frame, name] = ends
    return nulls
