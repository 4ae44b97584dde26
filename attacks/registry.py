"""Which attacks there are. The command line, sweeps, estimates, reports and the API read this.

An attack is declared in its own module of this package, or in a plugin:

    ATTACK = ATTACKS.add(Attack(name="gcg", config=GCGConfig, run=run, ...))

``run(bench, task, config)`` yields results; everything else of ``Attack`` has a default that suits
a prompt-level attack, which needs neither a source model nor a target string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from core.errors import AttackPlaneError, nearest
from core.records import AttackArtifact, Behaviour, content_hash
from core.registry import Registry
from core.rows import Row
from core.typed import from_values

if TYPE_CHECKING:  # a list of attacks must not wait for torch
    from attacks.result import AttackResult
    from attacks.workbench import Task, Workbench
    from core.models import ModelHandle

PAPER, QUICK = "paper", "quick"
Key = tuple[str, str | None]
"""(name in the artifacts, variant) of one prompt."""
Config = Any
"""The frozen dataclass of one attack's settings."""


@dataclass(frozen=True)
class Speed:
    """What a model does in a second here, measured (``pipeline/sweep/plan.py``).

    ``token``: seconds per token scored, packed, in a batch. ``gradient``: per token gradient.
    ``decoding_step``: per decoding step of a batch of ``batch`` replies.
    """

    token: float
    gradient: float
    decoding_step: float
    batch: int = 16


@dataclass(frozen=True)
class Attack:
    """One attack, as everything else knows it.

    Attributes:
        name: on the command line, in sweeps and in the API.
        summary: one line of help.
        config: frozen dataclass of its settings, whose defaults are the paper's.
        run: (workbench, task, config) -> results, each as soon as it is made.
        cost: (config, number of requests, speed) -> seconds, for the plan of a sweep.
        presets: settings by preset name; ``paper`` is the defaults, ``quick`` suits a CPU.
        on_cpu: the preset that a command takes by itself on a CPU.
        forms: further names that a sweep may use, each with settings that it fixes.
        sources: how many source models it needs: none, one or several.
        reads_weights: whether it needs its source's weights; else a served one will do.
        needs_target: whether a request without a target string is refused.
        keys: (config, request, workbench) -> the prompts that it makes for one request.
        identity: (workbench, config, name in the artifacts) -> what its artifacts depend on
            besides request, source model and seed.
        baselines: config -> (attack, config) of what it is compared with.
        steps, unit: config -> progress units per request, and their name.
        save_every: steps between two saves of a search in progress; 0: it cannot be resumed.
        check: (workbench, config) raises what is wrong before any work.
        finish: (workbench, config), after the last request.
        describe: one line on a finished artifact, where its losses do not say enough.
        catalogue: (title, lines) of the classes that it has, for a list of them.
        examples: command lines, without the program.
        reply_tokens: name in the artifacts -> new tokens that a reply needs, where that is more
            than usual because the prompt asks for copying or for a story first.
        command: whether it has a command of its own.
    """

    name: str
    summary: str
    config: type[Any]
    run: Callable[[Workbench, Task, Config], Iterator[AttackResult]]
    cost: Callable[[Config, int, Speed], float] = lambda config, count, speed: 0.0
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {PAPER: {}})
    on_cpu: str = QUICK
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sources: str = "none"
    reads_weights: bool = True
    needs_target: bool = False
    keys: Callable[[Config, Behaviour, Workbench], Sequence[Key]] | None = None
    identity: Callable[[Workbench, Config, str], Row] = lambda bench, config, name: asdict(config)
    baselines: Callable[[Config], Sequence[tuple[str, Config]]] = lambda config: ()
    steps: Callable[[Config], int] = lambda config: 1
    unit: str = "behaviour"
    save_every: int = 0
    check: Callable[[Workbench, Config], None] = lambda bench, config: None
    finish: Callable[[Workbench, Config], None] = lambda bench, config: None
    describe: Callable[[AttackArtifact], str] | None = None
    catalogue: Callable[[], Sequence[tuple[str, Sequence[str]]]] | None = None
    examples: Sequence[str] = ()
    reply_tokens: Mapping[str, int] = field(default_factory=dict)
    command: bool = True

    def __post_init__(self) -> None:
        known = {f.name for f in fields(self.config)}
        for preset, values in self.presets.items():
            for name in values.keys() - known:
                raise AttackPlaneError(
                    f"unknown setting {name!r}",
                    where=f"{self.name}, preset {preset!r}",
                    remedy=nearest(name, sorted(known)),
                )

    def keys_of(self, config: Config, behaviour: Behaviour, bench: Workbench) -> Sequence[Key]:
        return [(self.name, None)] if self.keys is None else self.keys(config, behaviour, bench)

    def make_config(self, values: Mapping[str, Any], *, where: str, preset: str = PAPER) -> Config:
        """A config from a preset and ``values``, which win.

        Raises:
            AttackPlaneError: unknown preset or setting (the nearest known one is named), or a
                value that the config refuses.
        """
        if preset not in self.presets:
            raise AttackPlaneError(
                f"unknown preset {preset!r}", where=where, remedy=nearest(preset, [*self.presets])
            )
        values = {**self.presets[preset], **values}
        return from_values(self.config, values, where)


ATTACKS: Registry[Attack] = Registry("attack", "attacks")


def find_attack(name: str) -> tuple[Attack, Mapping[str, Any]]:
    """An attack by its name or by the name of one of its forms, and the settings so fixed.

    Raises:
        AttackPlaneError: no such attack; the nearest known name is named.
    """
    known = ATTACKS.all()
    forms = {form: (a, fixed) for a in known.values() for form, fixed in a.forms.items()}
    if name in known:
        return known[name], {}
    if name not in forms:
        raise AttackPlaneError(
            f"unknown attack {name!r}", remedy=nearest(name, sorted([*known, *forms]))
        )
    return forms[name]


def reply_tokens_by_class() -> dict[str, int]:
    """Name in the artifacts -> new tokens of a reply, for the classes that need more than usual."""
    return {k: v for attack in ATTACKS.all().values() for k, v in attack.reply_tokens.items()}


def sources_hash(sources: Sequence[ModelHandle]) -> str:
    """Stands for several source models."""
    return content_hash([(model.spec, model.fingerprint) for model in sources])
