"""Time and memory of the commands that read a whole run, at any size.

Usage:

    python -m benchmarks.large_runs                                  (100,000 prompts, ten replies)
    python -m benchmarks.large_runs --prompts 2000 --replies 2
    python -m benchmarks.large_runs --command plane --command verify

The run is made on the spot: prompts with random words, of four attacks on 200 behaviours, and
replies of two targets. The targets are tiny models with random weights, so what is measured is
what the suite does with rows, not what a model takes. Every command is a process of its own. Peak
is its largest resident memory (Linux), of which torch itself takes about 300 MiB where weights are
needed.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from core.models import load
from core.records import AttackArtifact, Behaviour, Replay, content_hash
from core.store import ATTACKS, BEHAVIOURS, REPLAYS, RunFolder
from core.text import aligned

ROOT = Path(__file__).parents[1]
ATTACKERS = ("plain", "gcg", "persona", "persuasion")
BEHAVIOURS_OF_A_RUN = 200
OUTCOMES = ("refused", "complied", "neither")
WORDS = ("tea", "soup", "shed", "boat", "lamp", "glove", "paper", "stone", "river", "plum", "chalk")
CERTIFICATE = {"sent_as_meant": True, "verbatim": True, "system_prompt_hash": None}
PEAK = (
    "import runpy, sys; sys.argv[0] = 'cli.py'\n"
    "try: runpy.run_path('cli.py', run_name='__main__')\n"
    "finally: print(next(s for s in open('/proc/self/status') if 'VmHWM' in s), file=sys.stderr)"
)


def artifacts(prompts: int, source: str) -> Iterator[AttackArtifact]:
    """Prompts of every attack in turn; one plain prompt a behaviour."""
    drawn = random.Random(0)
    for n in range(prompts):
        behaviour = n % BEHAVIOURS_OF_A_RUN
        request = f"Write about {WORDS[behaviour % len(WORDS)]} number {behaviour}"
        first = n < BEHAVIOURS_OF_A_RUN
        attack = ATTACKERS[0] if first else ATTACKERS[1 + n % (len(ATTACKERS) - 1)]
        suffix = None if first else " " + " ".join(drawn.choices(WORDS, k=8))
        yield AttackArtifact(
            artifact_id=f"a{n:07}",
            behaviour_id=f"b{behaviour}",
            attack=attack,
            source_model="none" if first else source,
            request=request,
            prompt=request + (suffix or ""),
            suffix=suffix,
            suffix_ids=None,
            target_string=None,
            loss=None,
            loss_history=[],
            best_step=None,
            seed=0,
            config_hash="c",
            token_fidelity=None,
            variant=None if first else str(n),
        )


def replays(prompts: int, replies: int, targets: list[str], source: str) -> Iterator[Replay]:
    drawn = random.Random(1)
    for a in artifacts(prompts, source):
        for n in range(replies):
            target, outcome = targets[n % len(targets)], drawn.choice(OUTCOMES)
            yield Replay(
                replay_id=content_hash([a.artifact_id, n]),
                artifact_id=a.artifact_id,
                behaviour_id=a.behaviour_id,
                attack=a.attack,
                source_model=a.source_model,
                target_model=target,
                reply=" ".join(drawn.choices(WORDS, k=12)),
                judgements={"rules": float(outcome == "complied")},
                jailbroken=outcome == "complied",
                config_hash="c",
                certificate=CERTIFICATE,
                outcome=outcome,
                d=drawn.gauss(0, 1),
                sample=n // len(targets),
            )


def make_run(folder: Path, prompts: int, replies: int, targets: list[str]) -> None:
    models = {spec: load(spec).fingerprint for spec in targets}
    with RunFolder(folder) as run:
        run.begin_stage("gcg", {}, {targets[0]: models[targets[0]]})
        run.begin_stage("transfer", {"judges": ["rules"]}, models)
        known = {a.behaviour_id: a for a in artifacts(BEHAVIOURS_OF_A_RUN, targets[0])}
        with run.appending(BEHAVIOURS) as add:
            for name, a in known.items():
                add(Behaviour(name, a.request, None, "", "harmful", "large_runs").to_row())
        with run.appending(ATTACKS) as add:
            for a in artifacts(prompts, targets[0]):
                add(a.to_row())
        with run.appending(REPLAYS) as add:
            for r in replays(prompts, replies, targets, targets[0]):
                add(r.to_row())


def commands(folder: Path, targets: list[str]) -> dict[str, list[str]]:
    """Commands by name, in an order in which each finds what it needs."""
    run, base, prompts = str(folder / "run"), targets[0], str(folder / "prompts.jsonl")
    out = str(folder / "test_cases.json")
    return {
        "import": ["import", prompts, "--format=jsonl", "--run", str(folder / "imported")],
        "show": ["show", "--run", run],
        "report": ["report", "--run", run],
        "export": ["export", "--run", run, "--format=harmbench", "--attack=gcg", "--out", out],
        "verify": ["verify", "--run", run],
        "directions": ["directions", "--run", run, *(f"--model={t}" for t in targets)],
        "plane": ["plane", "--run", run, "--base", base, *(f"--target={t}" for t in targets)],
    }


COMMANDS = tuple(commands(Path(), ["", ""]))


def measured(command: list[str]) -> tuple[float, str, str]:
    """Seconds, peak MiB where it is told, and how it ended."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *command], cwd=ROOT, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    told = [line for line in done.stderr.splitlines() if "VmHWM" not in line]
    peaks = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("VmHWM")]
    end = "" if done.returncode == 0 else f"exit {done.returncode}: {' '.join(told[-2:])[:200]}"
    return seconds, f"{int(peaks[-1]) / 1024:.0f}" if peaks else "", end


@click.command()
@click.option("--prompts", type=click.IntRange(BEHAVIOURS_OF_A_RUN), default=100_000)
@click.option("--replies", type=click.IntRange(1), default=10, help="Of each prompt, two targets.")
@click.option("--command", "chosen", multiple=True, type=click.Choice(COMMANDS))
def main(prompts: int, replies: int, chosen: tuple[str, ...]) -> None:
    """Measure each command on a large run."""
    from tests.conftest import make_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        targets = [str(folder / name) for name in ("llama", "qwen2")]
        for target in targets:
            make_model(Path(target), Path(target).name)
        make_run(folder / "run", prompts, replies, targets)
        with open(folder / "prompts.jsonl", "w") as file:
            for a in artifacts(prompts, "elsewhere"):
                row = {"behaviour_id": a.behaviour_id, "attack": a.attack}
                row |= {"request": a.request, "prompt": a.prompt}
                file.write(json.dumps(row) + "\n")
        lines = [("command", "seconds", "peak MiB", "")]
        for name, command in commands(folder, targets).items():
            if not chosen or name in chosen:
                seconds, peak, end = measured(command)
                lines.append((name, f"{seconds:.0f}", peak, end))
                click.echo(f"{name}: {seconds:.0f} s, {peak} MiB {end}", err=True)
    click.echo(f"{prompts:,} prompts, {prompts * replies:,} replies\n{aligned(lines)}")


if __name__ == "__main__":
    main()
