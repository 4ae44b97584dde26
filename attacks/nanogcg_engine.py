"""nanogcg 0.3.0 as a reference engine, run as published in an environment of its own.

It pins transformers 4.47.1 and breaks on 5, so it lives in a virtual environment in the cache
folder, made on first use;
``$ATTACK_PLANE_NANOGCG`` names another interpreter that has it. The source model is written out
once in the older format (adapter merged) and both sides must agree on the loss of a short text
before anything runs.

Three faults of nanogcg are looked for in each result and written into the artifact (``faults_of``):

1. the suffix's ids change inside the prompt: it filters candidates by re-tokenising the suffix
   alone;
2. best_loss does not belong to best_string: with a buffer the string of a step is the buffer's
   best, the loss is the step's own;
3. early stop returns another string than the one that matched the target: it returns the lowest
   loss.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from attacks.likelihood import ROUNDING, plain_loss
from attacks.slot import SuffixSlot
from core.embedded import cache_folder
from core.errors import AttackPlaneError
from core.files import row_of_line
from core.models import LoadedModel
from core.prompt import Conversation, Renderer
from core.rows import Row

log = logging.getLogger(__name__)

REQUIREMENTS = ("nanogcg==0.3.0", "transformers==4.47.1")
WORKER = Path(__file__).parent / "data" / "nanogcg_worker.py"
INTERPRETER = "ATTACK_PLANE_NANOGCG"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def operations_of(slot: SuffixSlot, options: Row) -> float:
    """Of one step of nanogcg's, from what it feeds: 2 a parameter and token forward, 4 backward.

    Every candidate is fed from the suffix on, or whole without its prefix cache. Those that it
    filters out count too.
    """
    fed = len(slot.initial_ids) + len(slot.after_ids) + len(slot.target_ids)
    if not options.get("use_prefix_cache", True):
        fed += len(slot.before_ids)
    size = sum(p.numel() for p in slot.renderer.loaded.model.parameters())
    return size * fed * (2.0 * options["search_width"] + 6.0)


def interpreter() -> Path:
    """The Python that has nanogcg; its environment is made when it is not there whole.

    Raises:
        AttackPlaneError: it cannot be made.
    """
    if chosen := os.environ.get(INTERPRETER):
        if not shutil.which(chosen):
            raise AttackPlaneError("no such interpreter", where=f"${INTERPRETER}", got=chosen)
        return Path(chosen)
    folder = cache_folder() / "nanogcg-0.3.0"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ready = folder / "complete"
    if not ready.is_file():
        wanted = [f"torch=={torch.__version__.partition('+')[0]}", *REQUIREMENTS]
        log.info("making nanogcg's environment in %s (once): %s", folder, " ".join(wanted))
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                *wanted,
            ],
        ):
            done = subprocess.run(command, stdout=sys.stderr, check=False)
            if done.returncode:
                raise AttackPlaneError(
                    "cannot make nanogcg's environment",
                    where=" ".join(command),
                    got=f"exit status {done.returncode}",
                    remedy=(
                        f"check the network, or set ${INTERPRETER} to a Python that has "
                        f"{REQUIREMENTS[0]}"
                    ),
                )
        ready.write_text("\n".join(wanted) + "\n")
    return python


def older_config(config: Row) -> Row:
    """A transformers 5 ``config.json`` as 4.47 reads it: rope settings at the top level,
    ``torch_dtype``."""
    older = dict(config)
    rope = older.pop("rope_parameters", None)
    if rope:
        older["rope_theta"] = rope.get("rope_theta", older.get("rope_theta"))
        rest = {key: value for key, value in rope.items() if key != "rope_theta"}
        older["rope_scaling"] = None if rest.get("rope_type", "default") == "default" else rest
    if "dtype" in older:
        older["torch_dtype"] = older.pop("dtype")
    return older


class Reference:
    """A running worker. Requests and answers are dictionaries, one JSON line each."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, **request: Any) -> Row:
        """Send a request and read the next answer."""
        self._send(request)
        return self._read()

    def _send(self, request: Row) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # ``_read`` says what became of it

    def _read(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer = row_of_line(line.encode(), "its answer") if line else None
        except AttackPlaneError:
            answer = {"error": f"it says {line[:80]!r}"}
        if answer is None:
            answer = {"error": f"it ended with exit status {self._process.wait()}"}
        if "error" in answer:
            raise AttackPlaneError(
                "nanogcg failed",
                where="reference engine",
                got=answer["error"],
                remedy="its own options may help, for example filter_ids=false",
            )
        return answer

    def run(
        self,
        slot: SuffixSlot,
        config: Row,
        *,
        system: str | None = None,
        on_step: Callable[[Row], None] = lambda step: None,
        before_step: Callable[[], None] | None = None,
        torch_seed: int | None = None,
    ) -> Row:
        """One behaviour: nanogcg's result, and the ids that it put around the suffix.

        Args:
            config: fields of nanogcg's GCGConfig; the initial suffix is the slot's unless it is
            given.
            on_step: gets each step's loss, seconds by part and kept suffix ids.
            before_step: called before each step, while nanogcg waits; steps then carry their
            candidates too.
            torch_seed: seeds torch without nanogcg's deterministic mode, which its own ``seed``
            brings.
        """
        content = slot.content_before + "{optim_str}" + slot.content_after
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": content})
        paced = before_step is not None
        request = {
            "do": "run",
            "messages": messages,
            "target": slot.target_text,
            "paced": paced,
            "candidates": paced,
            "torch_seed": torch_seed,
        }
        initial = slot.suffix_texts([slot.initial_ids])[0]
        self._send(request | {"config": {"optim_str_init": initial, **config}})
        for _ in range(config["num_steps"]):
            if before_step:
                before_step()
                self._send({"do": "step"})
            answer = self._read()
            if "result" in answer:  # it stopped early
                return answer["result"]
            on_step(answer["step"])
        return self._read()["result"]


@contextmanager
def reference(loaded: LoadedModel) -> Iterator[Reference]:
    """nanogcg with this model, for as long as the context lasts.

    Raises:
        AttackPlaneError: its environment cannot be made, or it does not know or not compute this
        model.
    """
    python = interpreter()
    with tempfile.TemporaryDirectory(prefix="attack-plane-reference-") as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(older_config(json.loads(config.read_text()))))
        process = subprocess.Popen(
            [str(python), str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            engine = Reference(process)
            engine.ask(
                do="load",
                folder=folder,
                device=str(loaded.device),
                dtype=str(loaded.dtype).removeprefix("torch."),
                special_tokens=_special_tokens(loaded),
                chat_template=Renderer(loaded).template,
            )
            _check_agreement(engine, loaded)
            yield engine
        finally:
            process.kill()
            process.communicate()


def _special_tokens(loaded: LoadedModel) -> dict[str, str]:
    """What nanogcg's tokenizer is told.

    nanogcg removes every BOS from the rendered template and counts on the tokenizer to put one
    back. Where BOS also marks the turns, as SmolLM2's <|im_start|> does, that destroys the markup.
    There the tokenizer is not told of a BOS.
    """
    tokens = {
        name: getattr(loaded.tokenizer, name) for name in SPECIAL if getattr(loaded.tokenizer, name)
    }
    bos = tokens.get("bos_token")
    if bos and Renderer(loaded).text(Conversation.build("request")).count(bos) > 1:
        log.info(
            "%s: %r marks the turns and is kept from nanogcg, which would remove it",
            loaded.spec,
            bos,
        )
        del tokens["bos_token"]
    return tokens


def _check_agreement(engine: Reference, loaded: LoadedModel) -> None:
    """Both versions of transformers must compute the same model.

    The older one passes over a setting that it does not know, without a word.
    """
    ids = loaded.tokenizer("Write a short text about tea.", add_special_tokens=False).input_ids
    ours = plain_loss(loaded, ids[:-3], ids[-3:])
    theirs = engine.ask(do="loss", ids=ids, targets=3)["loss"]
    if not abs(ours - theirs) <= ROUNDING[loaded.dtype]:
        raise AttackPlaneError(
            "nanogcg's transformers computes another loss for this model",
            where=loaded.spec,
            got=f"{theirs:.5f}, ours {ours:.5f} nats per token",
            remedy="use a model of a family that transformers 4.47.1 serves, or the default engine",
        )


def scored_ids(result: Row, suffix_ids: list[int]) -> tuple[int, ...]:
    """The whole sequence that nanogcg scored with this suffix, target included."""
    return (*result["before_ids"], *suffix_ids, *result["after_ids"], *result["target_ids"])


def faults_of(
    engine: Reference,
    result: Row,
    scored: tuple[int, ...],
    faithful: bool,
    options: Row,
    tolerance: float,
) -> list[str]:
    """What is wrong with a result of nanogcg: the three faults above, each with its evidence.

    Args:
        scored: the sequence that nanogcg held when it gave ``best_string``.
        faithful: whether the prompt's text, tokenised, gives that sequence.
        options: nanogcg's configuration.
        tolerance: nats per token.
    """
    own = engine.ask(do="loss", ids=list(scored), targets=len(result["target_ids"]))
    faults = []
    if not faithful:
        faults.append("the ids that nanogcg scored are not those of the prompt's text")
    # with mellowmax its losses are no likelihoods
    if not options.get("use_mellowmax") and abs(own["loss"] - result["best_loss"]) > tolerance:
        claim = f"reported loss {result['best_loss']:.4f}, on the ids it held {own['loss']:.4f}"
        faults.append(f"best_loss does not belong to best_string: {claim}")
    if options.get("early_stop") and result["stopped"] and not own["match"]:
        faults.append("stopped early for a match, but the returned string does not match")
    return faults
