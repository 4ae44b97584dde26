"""Attack Plane from Python: attack a model, replay the prompts, and see where they lie inside it.

    import attack_plane as ap

    model = ap.load("embedded")                       # or ap.wrap(model, tokenizer)
    result = ap.gcg(model, "Write a fake invoice", "Sure, here is a fake invoice")
    rows = ap.replay([result], model)                 # replies and verdicts
    directions = ap.directions(model, harmful, harmless)
    ap.plot_plane(ap.project([result], directions))   # a matplotlib figure

Nothing here needs a run folder or prints. Importing this module loads no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from attacks.autodan import AutoDANConfig
    from attacks.gcg import GCGConfig
    from attacks.pair import PAIRConfig
    from attacks.result import AttackResult
    from attacks.templates import TemplatesConfig
    from attacks.workbench import Progress
    from core.models import LoadedModel
    from core.records import Behaviour
    from evaluation.judges import Judge
    from pipeline.in_memory import ModelDirections

ROOMS = (
    "core evaluation interchange plots geometry attacks training transfer pipeline study commands"
)

LAZY = {
    "attacks.registry": ("Attack", "ATTACKS"),
    "attacks.result": ("AttackResult",),
    "attacks.autodan": ("AutoDANConfig",),
    "attacks.gcg": ("GCGConfig",),
    "attacks.pair": ("PAIRConfig",),
    "attacks.templates": ("TemplatesConfig",),
    "core.errors": ("AttackPlaneError",),
    "core.models": ("LoadedModel",),
    "core.records": ("Behaviour", "Directions"),
    "evaluation.judges": ("JUDGES", "Exchange", "JudgeKind"),
    "pipeline.in_memory": ("ModelDirections",),
    "study.claims.registry": ("CLAIMS", "ClaimTest"),
}
"""Names that are imported when they are first asked for, by module."""


def _check_rooms() -> None:
    """Say so where another package stands in the place of one of ours."""
    here = Path(__file__).resolve().parent
    for room in ROOMS.split():
        spec = importlib.util.find_spec(room)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if here / room not in [Path(place).resolve() for place in places]:
            raise ImportError(
                f"attack_plane's package {room!r} is hidden by another one of that name: expected "
                f"{here / room}, found {places[0] if places else 'nothing'}. Uninstall or rename "
                "the other package, or put attack_plane's folder first on the path."
            )


_check_rooms()


def __getattr__(name: str) -> Any:
    for module, names in LAZY.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'attack_plane' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for names in LAZY.values() for name in names)})


def load(spec: str, device: str | None = None) -> LoadedModel:
    """Load a model by its spec: ``embedded``, ``ORG/NAME``, a folder or a GGUF file.

    Each form may be followed by ``+ADAPTER_FOLDER`` and by ``?dtype=bfloat16`` or ``?load=4bit``.
    No code from a folder runs, and weights that do not fit refuse the model by name.

    Args:
        device: for example ``"cuda:1"``; None takes CUDA, else MPS, else the CPU.
    """
    from core.models import load as load_model

    return load_model(spec, device)


def wrap(model: Any, tokenizer: Any, name: str = "wrapped") -> LoadedModel:
    """Attack a model of your own: what ``AutoModelForCausalLM`` and ``AutoTokenizer`` gave.

    Both are left as they were found: training mode, gradients, hooks, tokenizer. A peft model is
    read with its active adapter.

    Args:
        name: what results call the model.
    """
    from core.models import wrap as wrap_model

    return wrap_model(model, tokenizer, name)


def behaviours(
    source: str = "demonstration", *, label: str | None = None, splits: Sequence[str] = ()
) -> list[Behaviour]:
    """Requests with labels and target strings: the built-in set, a file, or a set of the hub.

    Args:
        label: only ``harmful``, ``harmless`` or ``pseudo_harmful`` ones. splits: only those of
            ``train``, ``validation`` or ``test``.
    """
    from evaluation.behaviours import load_behaviours

    return load_behaviours(source, label=label, splits=splits)


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
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[AttackResult]:
    """Run any attack of the registry, plugins included, on one request.

    Args:
        name: for example ``gcg`` or ``persona``'s attack ``templates``. request: a text, or a
            ``Behaviour``, whose id then names the random stream as the command line does.
        target: how the reply should begin; None takes the behaviour's own.
        source: the model that is attacked, for attacks that need one.
        config: the attack's own config; None is the paper's settings.
        on_step: called with a ``Progress`` after every step.

    Raises:
        AttackPlaneError: unknown attack, no source model or target where one is needed.
    """
    return _run(name, request, target, source, config, seed, on_step)


def _run(name: str, *arguments: Any) -> list[AttackResult]:
    from pipeline.in_memory import run_attack

    return run_attack(name, *arguments)


def gcg(
    source: LoadedModel,
    request: str | Behaviour,
    target: str | None = None,
    config: GCGConfig | None = None,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> AttackResult:
    """Optimise a suffix for one request (GCG, arXiv 2307.15043)."""
    return attack("gcg", request, target, source=source, config=config, seed=seed, on_step=on_step)[
        0
    ]


def autodan(
    source: LoadedModel,
    request: str | Behaviour,
    target: str | None = None,
    config: AutoDANConfig | None = None,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> AttackResult:
    """Evolve a readable prompt for one request (AutoDAN, arXiv 2310.04451)."""
    return _run("autodan", request, target, source, config, seed, on_step)[0]


def pair(
    source: LoadedModel,
    request: str | Behaviour,
    target: str | None = None,
    config: PAIRConfig | None = None,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> AttackResult:
    """Let a model write and improve prompts for one request (PAIR, arXiv 2310.08419)."""
    return _run("pair", request, target, source, config, seed, on_step)[0]


def templates(
    request: str | Behaviour, config: TemplatesConfig | None = None, *, seed: int = 0
) -> list[AttackResult]:
    """Wrap one request in the known prompt-level attacks; no model is needed."""
    return attack("templates", request, config=config, seed=seed)


def replay(
    prompts: Sequence[Prompt],
    target: LoadedModel,
    *,
    judges: Sequence[str | Judge] = ("refusal_phrases",),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Send prompts, verbatim, to a model; its replies and what the judges say.

    Returns:
        One row per prompt, in their order: attack, request, prompt, target_model, reply, jailbroken
        (the first judge's verdict, None where it cannot say), one score per judge under its name.
    """
    from pipeline.in_memory import replayed
    from transfer.replay import ReplayConfig

    return replayed(prompts, target, judges, ReplayConfig(max_new_tokens, temperature, seed))


def directions(
    model: LoadedModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    estimator: str = "harc",
    judge: str | Judge = "refusal_phrases",
    resamples: int = 200,
    seed: int = 0,
    system_prompt: str | None = None,
) -> ModelDirections:
    """Estimate the harmfulness and the refusal direction at every layer.

    Args:
        estimator: ``harc`` contrasts the two sets at both positions; ``zhao`` goes by the model's
            own replies, which ``judge`` calls refused or accepted.
        resamples: bootstrap samples, permutations and random directions each.
    """
    from geometry.directions import EstimateConfig
    from pipeline.in_memory import ModelDirections, estimated

    config = EstimateConfig(resamples, seed)
    found = estimated(model, harmful, harmless, estimator, judge, config, system_prompt)
    return ModelDirections(model, found)


def project(
    prompts: Sequence[Prompt],
    directions: ModelDirections,
    *,
    base: ModelDirections | None = None,
    layer: int | None = None,
    jailbroken: Sequence[bool | None] | None = None,
    with_plain: bool = True,
) -> list[dict[str, Any]]:
    """Where prompts lie on the (harmfulness, refusal) plane of a model.

    x is the projection of the residual at t_inst on the harmfulness direction, y that at
    t_post_inst on the refusal direction, relative to the harmless centroid, in units of the
    residual stream.

    Args:
        directions: of the model that reads the prompts. base: another model's, for a second frame.
        layer: None is the best one of ``base``, or of ``directions``.
        jailbroken: what ``replay`` found, one per prompt.
        with_plain: also project the plain request of every attacked prompt.

    Returns:
        Rows as ``pandas.DataFrame`` takes them, with the fields of ``core.records.PlanePoint``. A
        ``Behaviour`` is an anchor of its label, a text is a plain request.
    """
    from pipeline.in_memory import projected

    frame = base or directions
    points = projected(
        prompts,
        directions.model,
        directions.directions,
        frame.directions,
        frame.layer if layer is None else layer,
        jailbroken,
        with_plain,
    )
    return [point.to_row() for point in points if base or point.frame == "own"]


def plot_plane(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw rows of ``project`` as a matplotlib figure: one panel per target and frame."""
    from core.records import PlanePoint
    from geometry.classes import describe_classes
    from plots.plane_png import figure_of

    points = [PlanePoint.from_row(row) for row in rows]
    return figure_of(list(rows), describe_classes(points))


@contextmanager
def ablate(
    model: LoadedModel,
    direction: torch.Tensor,
    *,
    layers: Sequence[int] | None = None,
    strength: float = 1.0,
) -> Iterator[None]:
    """While open, the component along ``direction`` (d_model,) is taken out of the residual.

    At every token of whatever the model reads and writes. Hooks are gone when it closes.

    Args:
        layers: residual layers; None: all of them. strength: the share that is taken out.
    """
    from geometry.contrasts import unit
    from geometry.interventions import ablation, intervened

    chosen = range(model.n_layers + 1) if layers is None else layers
    rows = unit(direction.detach().float().cpu())[None]
    with intervened(model, ablation("direction", rows, chosen, strength)):
        yield


@contextmanager
def steer(
    model: LoadedModel, direction: torch.Tensor, strength: float, *, layers: Sequence[int]
) -> Iterator[None]:
    """While open, ``strength`` times the unit vector along ``direction`` is added to the residual.

    At every token of whatever the model reads and writes. Hooks are gone when it closes.

    Args:
        strength: in units of the residual; negative pushes the other way. layers: residual layers.
    """
    from geometry.interventions import intervened, steering

    vector = direction.detach().float().cpu()
    with intervened(model, steering("direction", vector, layers, strength)):
        yield
