"""The half of the reference engine that runs in nanogcg's own environment.

That is nanogcg 0.3.0 with transformers 4.47.1.

A program, not a module of the suite: it imports nothing of ours. ``attacks/nanogcg_engine.py``
starts it and talks to it in JSON lines; nanogcg's own messages go to stderr.

    -> {"do": "load", "folder", "device", "dtype", "special_tokens", "chat_template"}
                                                                            <- {"loaded"}
    -> {"do": "loss", "ids", "targets"}                     <- {"loss": nats per target token,
                                                            "match": greedy = target}
    -> {"do": "run", "messages", "target", "config", "paced", "candidates", "torch_seed"}
                                                                                    <- {"step"} ...,
                                                                                    {"result"}

``paced``: each step waits for a line {"do": "step"}, so that another program can be measured in
turn. ``candidates``: steps carry the
candidates and their losses. nanogcg is not changed: its functions are wrapped to be timed and
watched.
"""

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import nanogcg.gcg
import torch
import transformers

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Recording:
    """The embedding layer; remembers the ids of its first three calls: before the suffix, after it,
    target."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.ids: list[list[int]] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if len(self.ids) < 3:
            self.ids.append(ids[0].tolist())
        return self.layer(ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class Watched(nanogcg.gcg.GCG):
    """nanogcg's optimiser with its parts timed and its candidates kept."""

    def __init__(self, model: Any, tokenizer: Any, config: Any) -> None:
        super().__init__(model, tokenizer, config)
        self.embedding_layer: Any = Recording(model.get_input_embeddings())
        self.seconds: dict[str, float] = {}
        self.seen: dict[str, Any] = {}

    def timed(self, name: str, work: Callable[..., Any], *args: Any) -> Any:
        wait(self.model)
        start = time.perf_counter()
        result = work(*args)
        wait(self.model)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    def init_buffer(self) -> Any:
        self.buffer = super().init_buffer()
        forget_peak()
        return self.buffer

    def compute_token_gradient(self, optim_ids: torch.Tensor) -> torch.Tensor:
        self.seen = {"suffix": optim_ids[0].tolist()}
        return self.timed("gradient", super().compute_token_gradient, optim_ids)

    def _compute_candidates_loss_original(
        self, size: int, embeddings: torch.Tensor
    ) -> torch.Tensor:
        losses = self.timed("scoring", super()._compute_candidates_loss_original, size, embeddings)
        self.seen["losses"] = losses.tolist()
        return losses

    def drawing(self, name: str, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """``plain`` timed as ``name``, its candidates kept."""

        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            drawn = self.timed(name, lambda: plain(*args, **kwargs))
            self.seen["candidates"] = drawn.tolist()
            return drawn

        return wrapped

    def step(self, index: int, took: float, whole: bool) -> None:
        row = {"index": index, "seconds": {"step": took, **self.seconds}, "peak_mib": peak_mib()}
        row |= {"scored": len(self.seen["losses"]), "loss": min(self.seen["losses"])}
        row["kept"] = self.buffer.get_best_ids()[0].tolist()
        answer(step=row | (self.seen if whole else {}))


def answer(**values: Any) -> None:
    CHANNEL.write(json.dumps(values) + "\n")
    CHANNEL.flush()


def wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def peak_mib() -> float | None:
    """Peak since ``forget_peak``: memory of the device on CUDA, else of the process (None where it
    is not told)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if not STATUS.exists():
        return None
    return next(
        int(s.split()[1]) / 1024 for s in STATUS.read_text().splitlines() if s.startswith("VmHWM")
    )


def forget_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")


def load(request: dict[str, Any]) -> tuple[Any, Any]:
    dtype = getattr(torch, request["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(request["folder"], torch_dtype=dtype)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(request["folder"]) / "tokenizer.json"), **request["special_tokens"]
    )
    tokenizer.chat_template = request["chat_template"]
    answer(loaded=request["folder"])
    return model.to(request["device"]).eval().requires_grad_(False), tokenizer


def loss(model: Any, request: dict[str, Any]) -> None:
    ids, count = torch.tensor([request["ids"]], device=model.device), request["targets"]
    with torch.no_grad():
        logits = model(ids).logits[0, -count - 1 : -1].float()
    target = ids[0, -count:]
    value = torch.nn.functional.cross_entropy(logits, target)
    answer(loss=float(value), match=bool((logits.argmax(-1) == target).all()))


def run(model: Any, tokenizer: Any, request: dict[str, Any]) -> None:
    config = nanogcg.GCGConfig(**request["config"])
    if (
        request["torch_seed"] is not None
    ):  # nanogcg's own seed also turns on slow deterministic kernels
        torch.manual_seed(request["torch_seed"])
    logging.getLogger("nanogcg").setLevel(logging.ERROR)
    optimiser = Watched(model, tokenizer, config)

    def steps(indices: Iterable[int]) -> Iterator[int]:
        for index in indices:
            if request["paced"]:
                sys.stdin.readline()
            optimiser.seconds.clear()
            start = time.perf_counter()
            try:
                yield index
            finally:  # nanogcg leaves the loop here when it stops early
                if "losses" in optimiser.seen:
                    optimiser.step(index, time.perf_counter() - start, request["candidates"])

    module = nanogcg.gcg
    plain = module.sample_ids_from_grad, module.filter_ids, module.tqdm
    module.sample_ids_from_grad = optimiser.drawing("sampling", plain[0])
    module.filter_ids = optimiser.drawing("fidelity", plain[1])
    module.tqdm = steps
    try:
        result = optimiser.run(request["messages"], request["target"])
    finally:
        module.sample_ids_from_grad, module.filter_ids, module.tqdm = plain
    answer(
        result={
            "before_ids": optimiser.embedding_layer.ids[0],
            "after_ids": optimiser.embedding_layer.ids[1],
            "target_ids": optimiser.embedding_layer.ids[2],
            "best_loss": result.best_loss,
            "best_string": result.best_string,
            "losses": result.losses,
            "strings": result.strings,
            "stopped": optimiser.stop_flag,
        }
    )


def main() -> None:
    model = tokenizer = None
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        try:
            if request["do"] == "load":
                model, tokenizer = load(request)
            elif request["do"] == "loss":
                loss(model, request)
            elif request["do"] == "run":
                run(model, tokenizer, request)
        except Exception as error:  # noqa: BLE001  told to the other side, which decides
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    CHANNEL = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not end up between our lines
    main()
