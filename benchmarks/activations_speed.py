"""Collecting residuals: tokens per second and the share of this machine's matrix-product peak,
beside plain loops, in one run.

    python -m benchmarks.activations_speed [--model embedded] [--prompts 96] [--rounds 3] [--words
    60]

Methods, in turn within each round, on the same prompts (a demonstration request followed by 0 to
``--words`` filler words):

    plain, one by one    model(ids, output_hidden_states=True) prompt by prompt, what a notebook
                         does
    plain, batches of 16 the same, padded on the right, in the order given
    padded               ours without packing: no head, sorted by length, template prefix cached, a
                         budget of tokens a batch
    packed               ours

Tokens per second count every token of every prompt once; the share of the peak counts the products
that a method really computed (tokens fed, without padding) against a large square product timed in
the same round. Peak memory is of the process above what it held before. A second table has prompts
four times as long, to show what does not grow.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from benchmarks.measure import device_name, matrix_peak, median, timed
from core.memory import forget_peak, peak_mib
from core.models import LoadedModel, load
from core.prefix import shared_length
from core.prompt import Conversation, Prompt, Renderer
from core.text import aligned
from evaluation.behaviours import load_behaviours
from geometry.activations import POSITIONS, collect

FILLER = "and please explain each step with an example "


def prompts_of(loaded: LoadedModel, n: int, words: int) -> list[Prompt]:
    renderer, filler = Renderer(loaded), (FILLER * words).split()
    requests = [b.request for b in load_behaviours()]
    contents = [
        " ".join([requests[i % len(requests)], *filler[: (i * 37) % (words + 1)]]) for i in range(n)
    ]
    return [renderer.render(Conversation.build(text)) for text in contents]


@torch.no_grad()
def plain(loaded: LoadedModel, prompts: Sequence[Prompt], batch: int) -> torch.Tensor:
    """(prompt, layer, position, d_model) from Hugging Face's ``hidden_states``; the last layer is
    after the final norm."""
    residuals = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(len(p.ids) for p in part)
        ids = torch.tensor(
            [[*p.ids, *[0] * (longest - len(p.ids))] for p in part], device=loaded.device
        )
        mask = torch.tensor(
            [[1] * len(p.ids) + [0] * (longest - len(p.ids)) for p in part], device=loaded.device
        )
        hidden = loaded.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states
        columns = torch.tensor(
            [[getattr(p, name) for name in POSITIONS] for p in part], device=loaded.device
        )
        rows = torch.arange(len(part), device=loaded.device)[:, None]
        residuals.append(torch.stack([h[rows, columns] for h in hidden], 1).float().cpu())
    return torch.cat(residuals)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=60)
    options = parser.parse_args()
    loaded = load(options.model)
    print(loaded.describe())
    print(f"{device_name(loaded.device)}; median of {options.rounds} rounds in turn\n")
    for words, n in (
        (options.words, options.prompts),
        (4 * options.words, max(8, options.prompts // 4)),
    ):
        print(table(loaded, prompts_of(loaded, n, words), options.rounds), "\n")


def table(loaded: LoadedModel, prompts: Sequence[Prompt], rounds: int) -> str:
    ids = [str(i) for i in range(len(prompts))]
    methods: dict[str, Callable[[], torch.Tensor]] = {
        "plain, one by one": lambda: plain(loaded, prompts, 1),
        "plain, batches of 16": lambda: plain(loaded, prompts, 16),
        "padded": lambda: collect(loaded, prompts, ids, packed=False).resid,
        "packed": lambda: collect(loaded, prompts, ids).resid,
    }
    lengths = [len(p.ids) for p in prompts]
    shared = shared_length([p.ids for p in prompts], min(p.t_goal or p.t_inst for p in prompts))
    weights = 2 * sum(p.numel() for block in loaded.blocks for p in block.parameters())
    head = 2 * loaded.embedding_table.numel()
    config = loaded.config
    attention = (
        2
        * config.num_attention_heads
        * loaded.n_layers
        * (loaded.d_model // config.num_attention_heads)
    )

    def work(name: str) -> float:
        """Floating point operations of the products that a method computes, without padding."""
        skip, top = (0, head) if name.startswith("plain") else (shared, 0)
        return sum((n - skip) * (weights + top + attention * (n + skip)) for n in lengths)

    times: dict[str, list[float]] = {name: [] for name in methods}
    shares: dict[str, list[float]] = {name: [] for name in methods}
    memory: dict[str, float] = {}
    results = {}
    for _ in range(rounds):
        for name, method in methods.items():
            peak = matrix_peak(loaded.device, loaded.dtype, 3)
            forget_peak(loaded.device)
            before = peak_mib(loaded.device) or 0.0
            seconds, results[name] = timed(method, loaded.device)
            memory[name] = max(memory.get(name, 0.0), (peak_mib(loaded.device) or 0.0) - before)
            times[name].append(seconds)
            shares[name].append(work(name) / seconds / 1e9 / peak)
    reference = results["plain, one by one"][:, :-1]
    scale = reference.abs().amax((0, 2, 3))
    rows = [
        (
            "method",
            "seconds",
            "tokens/s",
            "share of peak",
            "memory (MiB)",
            "largest difference, of its layer's largest entry",
        )
    ]
    for name in methods:
        worst = ((results[name][:, :-1] - reference).abs().amax((0, 2, 3)) / scale).max()
        seconds = median(times[name])
        rows.append(
            (
                name,
                f"{seconds:.2f}",
                f"{sum(lengths) / seconds:.0f}",
                f"{median(shares[name]):.0%}",
                f"{memory[name]:.0f}",
                f"{worst:.1e}",
            )
        )
    title = (
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in "
        f"all, first {shared} shared"
    )
    return f"{title}\n{aligned(rows)}"


if __name__ == "__main__":
    main()
