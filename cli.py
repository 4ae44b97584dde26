"""Command line of the attack plane: one thin command a stage. Heavy imports happen inside the commands."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from core.errors import AttackPlaneError

EXIT_ERROR, EXIT_VERIFY, EXIT_INTERRUPTED = 1, 3, 130


class Group(click.Group):
    """Turns the suite's errors into clean messages and exit codes; Ctrl-C says how to go on."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AttackPlaneError as error:
            if ctx.find_root().params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(EXIT_ERROR)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # a fault of ours: one line here, all of it under --debug
            if ctx.find_root().params.get("debug"):
                raise
            click.echo(f"unexpected error: {type(error).__name__}: {error}", err=True)
            click.echo("repeat with --debug before the command for the traceback", err=True)
            ctx.exit(EXIT_ERROR)
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command goes on from here", err=True)
            ctx.exit(EXIT_INTERRUPTED)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


@click.group(cls=Group, context_settings=CONTEXT)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.version_option(package_name="attack-plane")
def cli(debug: bool) -> None:
    """Adversarial attacks on open-weight language models, and where they lie inside them.

    \b
    Model specs:  embedded | ORG/NAME[@REVISION] | FOLDER | FILE.gguf
                  each with +ADAPTER_FOLDER and ?dtype=bfloat16 or ?load=4bit
    Exit codes:   0 done, 1 error, 2 wrong usage, 3 verification failed, 130 stopped (resumable)

    \b
    Example, the whole way:
      python cli.py gcg --model embedded --run runs/first
      python cli.py transfer --run runs/first --target embedded
      python cli.py directions --run runs/first --model embedded
      python cli.py plane --run runs/first --target embedded
    """
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    for name in ("core", "attacks", "training", "transfer", "geometry"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
    for name in ("httpx", "httpcore", "urllib3", "filelock", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)


def quiet_libraries(command: Callable[..., None]) -> Callable[..., None]:
    """Turn off transformers' own progress bars for a command; ours say what is going on."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        import warnings

        from transformers.utils import logging as transformers_logging

        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        command(*args, **kwargs)

    return wrapped


def json_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``("buffer_size=4",)`` -> ``{"buffer_size": 4}``."""
    import json

    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise click.BadParameter(f"{pair!r}: expected FIELD=JSON, for example buffer_size=4") from error
    return found


RUN = click.option(
    "--run", required=True, type=click.Path(path_type=Path), help="Run folder, for example runs/first."
)


@cli.command()
@click.option("--model", default="embedded", help="Source model (a model spec).")
@click.option("--run", type=click.Path(path_type=Path), help="Run folder [default: runs/gcg-MODEL-HASH]")
@click.option(
    "--behaviours", default="demonstration", help="demonstration, a CSV/JSON/JSONL/TXT file, or a hub set."
)
@click.option("--label", default="harmful", help="Only behaviours with this label; 'any' for all.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    help="Only these splits [default: test of the demonstration set, else all]",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    help="Only the first so many [default: 4 of the demonstration set, else all]",
)
@click.option(
    "--preset",
    type=click.Choice(["auto", "paper", "quick"]),
    default="auto",
    help="paper: 500 steps, width 512, top-k 256. quick: 30 steps, width 32, top-k 64. auto: quick on a CPU.",
)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps [default: by preset]")
@click.option("--width", type=click.IntRange(1), help="Candidates per step [default: by preset]")
@click.option("--topk", type=click.IntRange(1), help="Tokens per position [default: by preset]")
@click.option("--n-replace", type=click.IntRange(1), default=1, help="Positions replaced per candidate.")
@click.option(
    "--suffix-length", type=click.IntRange(1), default=20, help='Words of the initial suffix ("! ! ...").'
)
@click.option("--init-suffix", help="Initial suffix instead.")
@click.option("--placement", default="{request} {suffix}", help="Where the suffix stands.")
@click.option("--system", help="System prompt.")
@click.option("--any-token", is_flag=True, help="Allow non-ASCII tokens.")
@click.option(
    "--stop-loss", type=float, default=0.0, help="Stop at this loss (nats per target token); 0: never."
)
@click.option(
    "--stop-on-match", is_flag=True, help="Stop at a suffix after which greedy decoding gives the target."
)
@click.option(
    "--momentum",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Of the token gradient (MAC); 0: none.",
)
@click.option(
    "--merge", type=click.IntRange(0), default=0, help="Merge the best so many candidates (I-GCG); 0: none."
)
@click.option(
    "--screen", type=click.IntRange(0), default=0,
    help="Score in reduced precision and only the best so many exactly; 0: all exactly.",
)  # fmt: skip
@click.option("--draft", help="Draft model of probe sampling (a model spec with the same vocabulary).")
@click.option(
    "--engine", type=click.Choice(["gcg", "nanogcg"]), default="gcg",
    help="gcg: ours. nanogcg: the package, as published, in an environment of its own (made on first use).",
)  # fmt: skip
@click.option(
    "--nanogcg-option", "nanogcg_options", multiple=True, metavar="FIELD=JSON",
    help="Another field of nanogcg's GCGConfig, for example buffer_size=4; repeatable.",
)  # fmt: skip
@click.option("--seed", type=int, default=0)
@click.option(
    "--save-every", type=click.IntRange(1), default=5, help="Steps between saves within a behaviour."
)
@click.option(
    "--baselines/--no-baselines", default=True, help="Also save plain, initial and random suffixes."
)
@quiet_libraries
def gcg(model: str, run: Path | None, behaviours: str, label: str, splits: tuple[str, ...], limit: int | None,
        preset: str, steps: int | None, width: int | None, topk: int | None, n_replace: int,
        suffix_length: int, init_suffix: str | None, placement: str, system: str | None, any_token: bool,
        stop_loss: float, stop_on_match: bool, momentum: float, merge: int, screen: int, draft: str | None, engine: str, nanogcg_options: tuple[str, ...], seed: int,
        save_every: int, baselines: bool) -> None:  # fmt: skip
    """Optimise adversarial suffixes (GCG).

    Saves each prompt as an artifact of the run, with its baselines; the same command goes on after a stop.

    \b
    Examples:
      python cli.py gcg
      python cli.py gcg --model embedded+runs/demo/checkpoints/step-12 --run runs/second --limit 16
      python cli.py gcg --model ORG/NAME --behaviours goals.csv --preset paper
      python cli.py gcg --engine nanogcg --limit 1 --steps 4
    """
    from dataclasses import asdict

    from attacks.gcg import GCGConfig
    from core.models import canonical_name, default_device
    from core.records import content_hash
    from evaluation.behaviours import DEMONSTRATION, load_behaviours
    from pipeline import attack, opened
    from reports import attack_table

    if preset == "auto":
        preset = "quick" if default_device().type == "cpu" else "paper"
        click.echo(f"preset {preset} for {default_device().type} (--preset chooses another)")
    defaults = (500, 512, 256) if preset == "paper" else (30, 32, 64)
    config = GCGConfig(
        num_steps=steps or defaults[0],
        search_width=width or defaults[1],
        topk=topk or defaults[2],
        n_replace=n_replace,
        suffix_length=suffix_length,
        init_suffix=init_suffix,
        placement=placement,
        system_prompt=system,
        ascii_only=not any_token,
        stop_loss=stop_loss,
        stop_on_match=stop_on_match,
        momentum=momentum,
        merge=merge,
        screen=screen,
        draft=draft,
    )
    built_in = behaviours == DEMONSTRATION
    splits = splits or (("test",) if built_in else ())
    found = load_behaviours(behaviours, label=None if label == "any" else label, splits=splits)
    chosen = found[: limit or (4 if built_in else None)]
    options = json_options(nanogcg_options)
    if options and engine != "nanogcg":
        raise click.UsageError("--nanogcg-option needs --engine nanogcg")
    hashed = content_hash([asdict(config), seed, options], 8)
    path = run or Path("runs") / f"{engine}-{canonical_name(model)}-{hashed}"
    source = opened(model)
    click.echo(
        f"{len(chosen)} of {len(found)} behaviours, {config.num_steps} steps, width {config.search_width} -> {path}"
    )
    artifacts = attack(
        path, source, chosen, config, seed=seed, save_every=save_every, baselines=baselines, engine=engine,
        engine_options=options,
    )  # fmt: skip
    click.echo(attack_table(artifacts))
    click.echo(f"next: python cli.py transfer --run {path} --target '{model}'")


@cli.command()
@RUN
@click.option(
    "--target", "targets", multiple=True, required=True, help="Target model (a model spec); repeatable."
)
@click.option(
    "--judge", "judges", multiple=True, default=("refusal_phrases", "target_prefix"),
    help="refusal_phrases, target_prefix, classifier:MODEL[#LABEL], judgezoo:NAME; the first one decides.",
)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), default=64)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0: greedy.")
@click.option("--seed", type=int, default=0, help="Of the sampling.")
@click.option("--batch-size", type=click.IntRange(1), default=16)
@quiet_libraries
def transfer(run: Path, targets: tuple[str, ...], judges: tuple[str, ...], max_new_tokens: int, temperature: float,
             seed: int, batch_size: int) -> None:  # fmt: skip
    """Replay frozen prompts on targets and judge.

    Every artifact of the run is sent verbatim; replies and judgements are kept.

    \b
    Example:
      python cli.py transfer --run runs/first --target embedded --target embedded+runs/demo/checkpoints/step-12
    """
    from pipeline import transfer as stage
    from transfer.replay import ReplayConfig

    click.echo(stage(run, targets, judges, ReplayConfig(max_new_tokens, temperature, seed), batch_size))


@cli.command()
@RUN
@click.option("--model", "models", multiple=True, required=True, help="Model spec; repeatable.")
@click.option("--estimator", type=click.Choice(["harc", "zhao", "both"]), default="both")
@click.option("--contrast", default="demonstration", help="Behaviours with labels harmful and harmless.")
@click.option(
    "--split", "splits", multiple=True,
    help="Only these splits [default: train and validation of the demonstration set, else all]",
)  # fmt: skip
@click.option("--resamples", type=click.IntRange(20), default=200, help="Bootstrap samples and null draws.")
@click.option("--system", help="System prompt.")
@click.option("--seed", type=int, default=0)
@quiet_libraries
def directions(run: Path, models: tuple[str, ...], estimator: str, contrast: str, splits: tuple[str, ...],
               resamples: int, system: str | None, seed: int) -> None:  # fmt: skip
    """Estimate directions at every layer.

    Harmfulness and refusal, by difference of means, with intervals and nulls.

    \b
    Example:
      python cli.py directions --run runs/first --model embedded --estimator harc
    """
    from evaluation.behaviours import DEMONSTRATION
    from pipeline import DirectionsConfig
    from pipeline import directions as stage

    estimators = ("harc", "zhao") if estimator == "both" else (estimator,)
    splits = splits or (("train", "validation") if contrast == DEMONSTRATION else ())
    config = DirectionsConfig(contrast, splits, resamples=resamples, seed=seed, system_prompt=system)
    stage(run, models, estimators, config)


@cli.command()
@RUN
@click.option("--target", "targets", multiple=True, help="Target model; repeatable [default: all of the run]")
@click.option("--base", help="Model of the base frame [default: the first target]")
@click.option("--estimator", type=click.Choice(["harc", "zhao"]), default="harc")
@click.option("--layer", type=click.IntRange(0), help="Layer [default: the base model's best layer score]")
@click.option("--anchors", default="demonstration", help="Plain prompts drawn as anchors.")
@click.option(
    "--anchor-split", "anchor_splits", multiple=True,
    help="Only these splits [default: test of the demonstration set, else all]",
)  # fmt: skip
@quiet_libraries
def plane(run: Path, targets: tuple[str, ...], base: str | None, estimator: str, layer: int | None, anchors: str,
          anchor_splits: tuple[str, ...]) -> None:  # fmt: skip
    """Project, export and draw the plane.

    Writes CSV, JSONL, Parquet, PNG and HTML into the run folder, in place of an earlier plane.

    \b
    Example:
      python cli.py plane --run runs/first
    """
    from evaluation.behaviours import DEMONSTRATION
    from pipeline import plane as stage
    from reports import classes_table

    written = stage(
        run,
        targets,
        base=base,
        estimator=estimator,
        layer=layer,
        anchors=anchors,
        anchor_splits=anchor_splits or (("test",) if anchors == DEMONSTRATION else ()),
    )
    click.echo(classes_table(run))
    for path in written:
        click.echo(path)


@cli.group(cls=Group)
def train() -> None:
    """Train checkpoints, which are targets like any other."""


@train.command()
@click.option("--model", default="embedded", help="Base model (a model spec).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the checkpoints.")
@click.option(
    "--behaviours", default="demonstration", help="Behaviours with splits; the training split is used."
)
@click.option("--steps", type=click.IntRange(1), default=500, help="Optimiser steps.")
@click.option(
    "--checkpoint", "checkpoints", multiple=True, type=int,
    help="Step to save at; repeatable [default: those of 50, 100, 250, 500 within the steps, and the last]",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=16)
@click.option("--learning-rate", type=float, default=2e-5)
@click.option("--rank", type=click.IntRange(1), default=64, help="LoRA rank.")
@click.option("--alpha", type=click.IntRange(1), default=16, help="LoRA alpha.")
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.1, help="LoRA dropout.")
@click.option("--seed", type=int, default=0)
@quiet_libraries
def sft(model: str, out: Path, behaviours: str, steps: int, checkpoints: tuple[int, ...], batch_size: int,
        learning_rate: float, rank: int, alpha: int, dropout: float, seed: int) -> None:  # fmt: skip
    """Fine-tune a model to refuse harmful requests (LoRA).

    \b
    Example, the demo's training:
      python cli.py train sft --out runs/sft --steps 24 --checkpoint 6 --checkpoint 24 --batch-size 8 \\
          --learning-rate 1e-3 --rank 16 --alpha 32 --dropout 0
    """
    from pipeline import train_sft
    from training.sft import SFTConfig

    config = SFTConfig(
        num_steps=steps,
        checkpoints=tuple(sorted({*(checkpoints or [c for c in (50, 100, 250) if c < steps] + [steps])})),
        batch_size=batch_size,
        learning_rate=learning_rate,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        seed=seed,
    )
    for path in train_sft(model, out, config, behaviours):
        click.echo(f"{model}+{path}")
    click.echo((out / "losses.csv").read_text().strip())


@cli.command()
@RUN
@click.option(
    "--tolerance", type=float, default=1e-3, help="Largest difference of losses (nats per target token)."
)
@quiet_libraries
def verify(run: Path, tolerance: float) -> None:
    """Render and score every artifact anew.

    Exits with 3 where loss or token fidelity does not hold.

    \b
    Example:
      python cli.py verify --run runs/first
    """
    from pipeline import verify as stage

    faults = count = 0
    for artifact, found in stage(run, tolerance):
        count += 1
        faults += found.fault is not None
        state = f"FAULT: {found.fault}" if found.fault else "holds"
        click.echo(f"{artifact.artifact_id}  {artifact.attack:15} {artifact.behaviour_id:28} {state}")
    click.echo(f"{count - faults} of {count} artifacts hold")
    if faults:
        sys.exit(EXIT_VERIFY)


@cli.command()
@RUN
def show(run: Path) -> None:
    """Print what a run holds.

    Settings, losses, success rates, classes on the plane.

    \b
    Example:
      python cli.py show --run runs/demo
    """
    from core.store import RunFolder
    from pipeline import artifacts_of, replays_of
    from reports import attack_table, classes_table, matrix_table
    from transfer.matrix import matrix

    folder = RunFolder.existing(run)
    for stage, settings in folder.manifest["stages"].items():
        shown = ", ".join(f"{k}={v}" for k, v in settings.items() if not isinstance(v, list) or len(v) < 9)
        click.echo(f"{stage}: {shown}")
    artifacts, replays = artifacts_of(folder), replays_of(folder)
    for source in dict.fromkeys(a.source_model for a in artifacts):
        click.echo(f"\nsource {source}")
        click.echo(attack_table([a for a in artifacts if a.source_model == source]))
    if replays:
        click.echo("\n" + matrix_table(matrix(replays)))
    if (run / "plane.jsonl").exists():
        click.echo("\n" + classes_table(run))


@cli.command()
@click.argument("spec", required=False)
@click.option("--fetch", is_flag=True, help="Fetch and convert the embedded model now.")
@quiet_libraries
def models(spec: str | None, fetch: bool) -> None:
    """List spec forms and cached models.

    With SPEC, load that model and describe it.

    \b
    Examples:
      python cli.py models
      python cli.py models --fetch
      python cli.py models 'embedded?dtype=float32'
    """
    from core.embedded import SHA256, cache_folder, embedded_folder, is_whole
    from core.models import FORMS, hub_cache, load

    if fetch:
        click.echo(embedded_folder())
        return
    if spec:
        loaded = load(spec)
        click.echo(f"{loaded.describe()}, fingerprint {loaded.fingerprint}")
        return
    click.echo(f"forms: {FORMS}")
    click.echo(f"cache: {cache_folder()} (set ATTACK_PLANE_CACHE to move it)")
    for folder in sorted((cache_folder() / "converted").glob("*")):
        if is_whole(folder):
            size = sum(f.stat().st_size for f in folder.iterdir()) / 2**20
            name = "embedded" if folder.name == SHA256[:16] else "GGUF file"
            click.echo(f"  {name}  {folder.name}  {size:.0f} MiB")
    for name, mib in hub_cache():
        click.echo(f"  {name}  {mib:.0f} MiB (hub)")


@cli.command()
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/demo"), help="Run folder.")
@quiet_libraries
def demo(run: Path) -> None:
    """Run every stage on the embedded model.

    Trains refusing checkpoints, attacks one, replays, estimates directions, draws the plane. Under 15 minutes on 2 cores.

    \b
    Example:
      python cli.py demo
    """
    import time

    from demo import demo as whole

    start = time.monotonic()
    for path in whole(run):
        click.echo(path)
    click.echo(f"{(time.monotonic() - start) / 60:.1f} minutes; python cli.py verify --run {run}")


def main() -> None:
    cli()


if __name__ == "__main__":
    main()
