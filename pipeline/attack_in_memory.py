"""Attacks without a run folder: what the Python API stands on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from attacks.registry import PAPER, find_attack
from attacks.result import AttackResult
from attacks.workbench import Progress, Task, Workbench
from core.errors import AttackPlaneError
from core.models import LoadedModel, ModelHandle, evaluating, handle_of
from core.progress import reporting
from core.records import Behaviour


def run_attack(
    name: str,
    request: str | Behaviour,
    target: str | None = None,
    *,
    source: LoadedModel | None = None,
    config: Any = None,
    preset: str = PAPER,
    seed: int = 0,
    on_step: Callable[[Progress], None] | None = None,
) -> list[AttackResult]:
    """Run one attack of the registry on one request."""
    attack, _ = find_attack(name)
    behaviour = behaviour_of(request, target)
    if attack.sources == "several":
        raise AttackPlaneError(
            f"{attack.name} optimises on several requests",
            remedy=f"call attack_plane.{attack.name}, or run it on the command line",
        )
    sources = [source] if source else []
    return run_attacks(name, [behaviour], sources, config, preset, seed, on_step)


def run_attacks(
    name: str,
    behaviours: Sequence[str | Behaviour],
    sources: Sequence[LoadedModel],
    config: Any,
    preset: str,
    seed: int,
    on_step: Callable[[Progress], None] | None,
) -> list[AttackResult]:
    """Run one attack on several requests, one after another."""
    attack, made = find_attack(name)[0], config_of(name, config, preset)
    requests = [behaviour_of(request) for request in listed(behaviours, "requests")]
    sources = listed(sources, "models")
    if attack.sources != "none" and not sources:
        raise AttackPlaneError(f"{name} needs a source model", remedy="give one of ap.load(...)")
    if attack.needs_target and not all(b.target_string for b in requests):
        raise AttackPlaneError(
            f"{name} needs a target string", remedy="say how the reply should begin, with target="
        )
    results: list[AttackResult] = []
    handles = [handle_of(source) for source in sources]
    known = {handle.spec: handle for handle in handles}  # helpers are not loaded twice
    bench = Workbench(
        handles if attack.sources != "none" else [],
        requests,
        seed,
        open_model=lambda spec: known.get(spec) or ModelHandle(spec),
    )
    with bench, reporting(None), ExitStack() as stack:
        for source in sources:
            stack.enter_context(evaluating(source))
        attack.check(bench, made)
        for behaviour in requests:
            task = Task(behaviour, on_step=on_step or (lambda progress: None))
            results += attack.run(bench, task, made)
    return results


def config_of(name: str, config: Any, preset: str) -> Any:
    """The settings of an attack or of one of its forms, which fixes some of them.

    Raises:
        AttackPlaneError: a config of another class; an unknown preset.
    """
    attack, fixed = find_attack(name)
    if config is None:
        return attack.make_config(fixed, where=name, preset=preset)
    if not isinstance(config, attack.config):
        raise AttackPlaneError(
            "a config of another class",
            where=name,
            got=type(config).__name__,
            remedy=f"give a {attack.config.__name__}",
        )
    return replace(config, **fixed)


def behaviour_of(request: str | Behaviour, target: str | None = None) -> Behaviour:
    """A request as a behaviour; ``target`` wins over its own target string."""
    if isinstance(request, str):
        return Behaviour("request", request, target, "none", "harmful", "none")
    return replace(request, target_string=target) if target else request


def listed(items: Any, what: str) -> list[Any]:
    """A sequence as a list; a lone item is refused, for a text would be read letter by letter."""
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise AttackPlaneError(
            f"not a list of {what}", got=type(items).__name__, remedy="put it into a list"
        )
    return list(items)
