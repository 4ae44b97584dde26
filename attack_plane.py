"""Attack Plane from Python: attack a model, replay the prompts, and see where they lie inside it.

    import attack_plane as ap

    model = ap.load("embedded")                       # or ap.wrap(model, tokenizer)
    result = ap.gcg(model, "Write a fake invoice", "Sure, here is a fake invoice")
    rows = ap.replay([result], model)                 # replies and verdicts
    directions = ap.directions(model, harmful, harmless)
    ap.plot_plane(ap.project([result], directions))   # a matplotlib figure

But for ``train_arm``, nothing here needs a folder, and nothing is printed or drawn on the terminal:
progress is told to a function, where one is given. What a user can mend is raised as
``AttackPlaneError``. Importing this module loads no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attacks.autodan import AutoDANConfig
    from attacks.gcg import GCGConfig
    from attacks.pair import PAIRConfig
    from attacks.result import AttackResult
    from attacks.templates import TemplatesConfig
    from attacks.universal import UniversalConfig
    from attacks.workbench import Progress
    from core.models import LoadedModel
    from core.models import load as load
    from core.models import wrap as wrap
    from core.progress import OnProgress
    from core.records import Behaviour
    from core.rows import Row
    from core.served import Server as Server
    from evaluation.judges import Judge
    from geometry.steering import ablate as ablate
    from geometry.steering import steer as steer
    from pipeline.in_memory import ModelDirections

ROOMS = (
    "core evaluation interchange plots geometry attacks training transfer pipeline study commands"
)

LAZY = {
    "attacks.registry": ("Attack", "ATTACKS"),
    "attacks.result": ("AttackResult",),
    "attacks.autodan": ("AutoDANConfig",),
    "attacks.gcg": ("GCGConfig",),
    "attacks.nanogcg": ("NanoGCGConfig",),
    "attacks.pair": ("PAIRConfig",),
    "attacks.templates": ("TemplatesConfig",),
    "attacks.universal": ("UniversalConfig",),
    "attacks.workbench": ("Progress",),
    "core.errors": ("AttackPlaneError",),
    "core.models": ("LoadedModel", "load", "wrap"),
    "core.records": ("AttackArtifact", "Behaviour", "Directions"),
    "core.served": ("Server",),
    "evaluation.judges": ("JUDGES", "Exchange", "Judge", "JudgeKind"),
    "geometry.steering": ("ablate", "steer"),
    "pipeline.in_memory": ("ModelDirections",),
    "pipeline.train": ("train_arm",),
    "training.registry": ("ARMS",),
    "study.claims.registry": ("CLAIMS", "ClaimTest"),
}
"""Names that are imported when they are first asked for, by module."""


def _check_rooms() -> None:
    """Say so where another package or module stands in the place of one of ours."""
    here = Path(__file__).resolve().parent
    for room in ROOMS.split():
        spec = importlib.util.find_spec(room)
        locations = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        places = [place for place in locations if place]
        if here / room not in [Path(place).resolve() for place in places]:
            raise ImportError(
                f"attack_plane's package {room!r} is hidden by another one of that name: expected "
                f"{here / room}, found {places[0] if places else 'nothing'}. Uninstall or rename "
                "the other one, or put attack_plane's folder first on the path."
            )


_check_rooms()


def __getattr__(name: str) -> Any:
    for module, names in LAZY.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'attack_plane' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for names in LAZY.values() for name in names)})


def behaviours(
    source: str = "demonstration", *, label: str | None = None, splits: Sequence[str] | str = ()
) -> list[Behaviour]:
    """Requests with labels and target strings.

    Args:
        source: ``demonstration`` (the built-in set), a file, or a set of the hub by name.
        label: only ``harmful``, ``harmless`` or ``pseudo_harmful`` ones.
        splits: only those of ``train``, ``validation`` or ``test``.

    Raises:
        AttackPlaneError: no such set, rows that cannot be read, or none that fits.
    """
    from evaluation.behaviours import load_behaviours

    chosen = [splits] if isinstance(splits, str) else splits
    return load_behaviours(source, label=label, splits=chosen)


OnStep = Callable[["Progress"], None]
Prompt = Any
"""An ``AttackResult``, an ``AttackArtifact``, a ``Behaviour`` (its plain request) or a text."""


def attack(
    name: str,
    request: str | Behaviour,
    target: str | None = None,
    *,
    source: LoadedModel | None = None,
    config: Any = None,
    preset: str = "paper",
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[AttackResult]:
    """Run any attack on one request, for example ``gcg``, ``templates`` or one of your plugin.

    Args:
        name: the attack's name, or that of one of its forms, such as ``autodan_ga``.
        request: a text or a ``Behaviour``. A behaviour's id names the random stream, so it gives
            what the command line gives with the same settings and seed.
        target: how the reply should begin; None takes the behaviour's own.
        source: the model that is attacked. Templates need none.
        config: the attack's own config.
        preset: settings where there is no config: ``paper`` (the published ones, hours on a CPU)
            or ``quick`` (minutes; what the commands take on a CPU, where there is no ``fast``).
        seed: of the random stream.
        on_step: called with a ``Progress`` after every step.

    Returns:
        The attack's prompts for this request, most attacks make one.

    Raises:
        AttackPlaneError: unknown attack, a config of another class, no source model or target
            where one is needed.
    """
    from pipeline.attack_in_memory import run_attack

    options = {"source": source, "config": config, "preset": preset}
    return run_attack(name, request, target, **options, seed=seed, on_step=on_step)


def gcg(
    source: LoadedModel,
    request: str | Behaviour,
    target: str | None = None,
    config: GCGConfig | None = None,
    **options: Any,
) -> AttackResult:
    """Optimise a suffix for one request (GCG, arXiv 2307.15043).

    Arguments, further options (``preset``, ``seed``, ``on_step``) and errors are those of
    ``attack``. Losses are nats per target token.
    """
    return attack("gcg", request, target, source=source, config=config, **options)[0]


def gcg_universal(
    sources: Sequence[LoadedModel],
    requests: Sequence[Behaviour],
    config: UniversalConfig | None = None,
    *,
    preset: str = "paper",
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[AttackResult]:
    """Optimise one suffix for several requests and models (universal GCG, arXiv 2307.15043).

    The suffix is optimised on the first ``config.optimise_on`` requests. Every request gets a
    result; its ``variant`` is ``seen`` or ``held out``. Other arguments are those of ``attack``.
    """
    from pipeline.attack_in_memory import run_attacks

    return run_attacks("gcg_universal", requests, sources, config, preset, seed, on_step)


def autodan(
    source: LoadedModel,
    request: str | Behaviour,
    target: str | None = None,
    config: AutoDANConfig | None = None,
    **options: Any,
) -> AttackResult:
    """Evolve a readable prompt for one request (AutoDAN, arXiv 2310.04451); as ``gcg``."""
    return attack("autodan", request, target, source=source, config=config, **options)[0]


def pair(
    source: LoadedModel,
    request: str | Behaviour,
    target: str | None = None,
    config: PAIRConfig | None = None,
    **options: Any,
) -> AttackResult:
    """Let a model write and improve prompts for one request (PAIR, arXiv 2310.08419); as ``gcg``.

    No target is needed. The config names the attacker and the judge; by default the attacked model
    is its own attacker. ``Progress.loss`` is 1 minus the judge's score from 0 to 1.
    """
    return attack("pair", request, target, source=source, config=config, **options)[0]


def templates(
    request: str | Behaviour, config: TemplatesConfig | None = None, *, seed: int = 0
) -> list[AttackResult]:
    """Wrap one request in the known prompt-level attacks; no model is needed, losses are None."""
    return attack("templates", request, config=config, seed=seed)


def replay(
    prompts: Sequence[Prompt],
    target: LoadedModel | Server,
    *,
    judges: Sequence[str | Judge] | str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    replies: int = 1,
    system_prompt: str | None = None,
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """Send prompts, verbatim, to a model; its replies and what the judges say.

    Args:
        prompts: results, artifacts, behaviours (their plain requests) or texts.
        target: the model that replies, or ``Server("http://HOST/v1#MODEL")``.
        judges: specs or objects. The first one decides ``jailbroken``. None is the default judge,
            ``three_way``.
        max_new_tokens: of a reply; None is 64, and more for attack classes that ask for copying.
        temperature, seed, replies: of the sampling, 0 is greedy; replies to each prompt.
        system_prompt: stands before texts and behaviours; attacks bring their own.
        on_progress: called with (what, done, total).

    Returns:
        One row per reply, in the prompts' order: attack, request, prompt, target_model, reply,
        outcome (refused, complied, neither, or None where the judge cannot say), jailbroken
        (whether that is complied), d (how far the model leans towards refusing, nats per token, see
        ``evaluation/refusal_score.py``), and one score per judge under its name. A score is 1 where
        the model did what was asked, 0 where it did not.
    """
    from pipeline.in_memory import replayed
    from transfer.replay import ReplayConfig

    config = ReplayConfig(max_new_tokens, temperature, seed, replies)
    return replayed(prompts, target, judges, config, system_prompt, on_progress)


def directions(
    model: LoadedModel,
    harmful: Sequence[str | Behaviour],
    harmless: Sequence[str | Behaviour],
    *,
    estimator: str = "harc",
    judge: str | Judge | None = None,
    resamples: int = 200,
    seed: int = 0,
    system_prompt: str | None = None,
    on_progress: OnProgress | None = None,
) -> ModelDirections:
    """Estimate the harmfulness and the refusal direction at every layer.

    Args:
        model: the model that reads the requests.
        harmful: requests of one side of the contrast, at least four.
        harmless: requests of the other side, at least four.
        estimator: ``harc`` contrasts the two sets at both positions; ``zhao`` contrasts for refusal
            what the model itself refused with what it accepted.
        judge: says refused or accepted, for ``zhao``; None is ``rules``.
        resamples: number of bootstrap samples, of permutations and of random directions.
        seed: of these.
        system_prompt: stands before every request.
        on_progress: called with (what, done, total).

    Raises:
        AttackPlaneError: fewer than four requests, or for ``zhao`` replies, on a side.
    """
    from geometry.directions import EstimateConfig
    from pipeline.in_memory import ModelDirections, estimated

    config = EstimateConfig(resamples, seed)
    sets = (harmful, harmless)
    made = estimated(model, *sets, estimator, judge, config, system_prompt, on_progress)
    return ModelDirections(model, made)


def project(
    prompts: Sequence[Prompt],
    directions: ModelDirections,
    *,
    base: ModelDirections | None = None,
    layer: int | None = None,
    jailbroken: Sequence[bool | None] | None = None,
    with_plain: bool = True,
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """Where prompts lie on the (harmfulness, refusal) plane of a model.

    x is the projection of the residual at t_inst on the harmfulness direction, y that at
    t_post_inst on the refusal direction, relative to the harmless centroid, in units of the
    residual stream.

    Args:
        prompts: results, artifacts or texts; a ``Behaviour`` is an anchor of its label. Texts and
            anchors get the system prompt of ``base``, or of ``directions``.
        directions: of the model that reads the prompts.
        base: another model's, for a second frame.
        layer: None is the best one of ``base``, or of ``directions``.
        jailbroken: what ``replay`` said, one per prompt.
        with_plain: also project the plain request of every attacked prompt.
        on_progress: called with (what, done, total).

    Returns:
        Rows as ``pandas.DataFrame`` takes them, with the fields of ``core.records.PlanePoint``: per
        frame one row per prompt, then the plain requests that were added.
    """
    from pipeline.in_memory import projected

    frame = base or directions
    chosen = frame.layer if layer is None else layer
    points = projected(prompts, directions, frame, chosen, jailbroken, with_plain, on_progress)
    return [point.to_row() for point in points if base or point.frame == "own"]


def plot_plane(rows: Sequence[Row] | Any) -> Figure:
    """Draw rows of ``project``, or a frame of them, as a matplotlib figure."""
    from pipeline.in_memory import plane_figure

    return plane_figure(rows)
