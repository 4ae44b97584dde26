"""Command line of the attack plane. The commands live in ``commands/``, one thin function a stage."""

from __future__ import annotations

import logging

import click

from commands import gcg, interchange, looks, mechanism, prompts, stages
from commands.common import CONTEXT, Group


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


for command in (
    gcg.gcg,
    *prompts.COMMANDS,
    *stages.COMMANDS,
    *mechanism.COMMANDS,
    *interchange.COMMANDS,
    *looks.COMMANDS,
):
    cli.add_command(command)


def main() -> None:
    cli()


if __name__ == "__main__":
    main()
