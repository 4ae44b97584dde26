"""Attacks in a run folder, as the tests drive them: one plan, with stand-ins for its helpers."""

from __future__ import annotations

from attacks.registry import find_attack
from core.models import handle_of
from pipeline.campaign import Cells, Plan, make_bench


def cells(
    run, name, config, behaviours, *sources, seed=0, save_every=None, chats=None, judges=None
):
    """One attack's cells; ``chats`` and ``judges`` stand in for helpers, by spec."""
    attack, _ = find_attack(name)
    plan = Plan(attack, config, tuple(handle_of(s) for s in sources), save_every)
    bench = make_bench(run, plan, behaviours, seed, lambda spec: None)
    for kind, helpers in (("chat", chats), ("judge", judges)):
        for spec, helper in (helpers or {}).items():
            bench.once((kind, spec), lambda helper=helper: helper)
    return Cells(run, plan, bench)


def attacked(run, name, config, behaviours, *sources, on_failure=None, **more):
    """Artifacts of one attack on the behaviours."""
    found = cells(run, name, config, behaviours, *sources, **more)
    found.begin()
    return found.attack(behaviours, on_failure)


class Deciding:
    """A judge that decides by a function of the exchange."""

    threshold = 0.5

    def __init__(self, decide, name="deciding"):
        self.decide, self.name = decide, name

    def score(self, exchanges):
        return [float(self.decide(e)) for e in exchanges]
