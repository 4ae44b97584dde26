"""Options that are not GCG: each does what its paper says, takes only exactly scored suffixes, and
is off by default."""

import copy
import dataclasses
import json

import pytest
import torch

from attacks.gcg import GCGConfig, draft_model
from attacks.gcg_search import GCGState, run_gcg
from attacks.objective import TargetLoss
from attacks.rough import RoughModel
from attacks.screening import Screening, rough_copy
from attacks.selection import choose, merged, probe_sampled
from core.errors import AttackPlaneError
from core.models import ModelHandle, load
from core.statistics import spearman
from core.store import RunFolder
from tests.campaigns import cells
from tests.test_gcg import SMALL, allowed_of, behaviours, candidates_of, slot_of


def test_nothing_but_gcg_is_on_by_default():
    config = GCGConfig()
    assert (config.momentum, config.merge, config.draft) == (0.0, 0, None)


def test_merging_joins_the_replacements_of_the_first_k_and_the_better_keeps_its_position():
    suffix = torch.tensor([1, 2, 3])
    best = torch.tensor([[1, 9, 3], [1, 8, 3], [7, 2, 3]])
    assert merged(suffix, best).tolist() == [[1, 9, 3], [1, 9, 3], [7, 9, 3]]


def test_spearman_is_the_hand_derived_number():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, a.exp()) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, torch.tensor([2.0, 1.0, 3.0, 4.0])) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman(a[:1], a[:1]) == spearman(a, torch.ones(4)) == 0.0


class Table:
    """Stands in for an objective: a loss for each first token; remembers what was asked."""

    def __init__(self, losses):
        self.table, self.asked = torch.tensor(losses), []

    def losses(self, suffixes):
        self.asked.append(len(suffixes))
        return self.table[suffixes[:, 0]]


def test_probe_sampling_scores_the_share_that_the_paper_says():
    count = 64
    candidates = torch.arange(count)[:, None]
    exact = Table([float((7 * i) % count) for i in range(count)])
    generator = torch.Generator().manual_seed(0)
    agreeing = probe_sampled(exact, Table(exact.table.tolist()), candidates, generator)
    assert exact.asked == [4]  # 64 / 16 probes
    assert (
        int(exact.table.argmin()) in agreeing[:, 0] and len(agreeing) <= 5
    )  # rho = 1: the draft's best alone
    opposed = probe_sampled(exact, Table((-exact.table).tolist()), candidates, generator)
    assert 8 <= len(opposed) <= 12  # rho = -1: a whole eighth of the draft's best


class Rough(Table):
    """A table with rough losses of its own."""

    def __init__(self, losses, errors):
        super().__init__(losses)
        self.rough = self.table + torch.tensor(errors)

    def rough_losses(self, suffixes):
        return self.rough[suffixes[:, 0]]


def test_a_screening_learns_errors_in_its_first_step_and_stops_where_none_can_be_lower():
    candidates = torch.arange(32)[:, None]
    errors = [-0.01, -0.03] * 16  # mean -0.02, deviation 0.01 sqrt(32 / 31)
    screening = Screening()
    first = Rough([float(n) for n in range(32)], errors)
    assert screening.lowest(first, candidates) == [(0, 0.0)] and first.asked == [32]
    assert screening.mean == pytest.approx(-0.02, abs=1e-6)
    assert screening.deviation == pytest.approx(0.01 * (32 / 31) ** 0.5, abs=1e-6)
    # 2.25 x 0.0102 = 0.023: the first three are within that of the lowest
    steps = Rough([0.0, 0.01, 0.02, 0.03, 0.04, *[1.0] * 27], [-0.02] * 32)
    assert screening.lowest(steps, candidates) == [(0, 0.0)] and steps.asked == [3]
    near = Rough([0.0, 0.001, 0.002, 0.003, 0.004, *[1.0] * 27], [-0.02] * 32)
    assert screening.lowest(near, candidates) == [(0, 0.0)] and near.asked == [4, 1]
    # the first is worse than it seemed, so the third may be better, and is
    worse = Rough([0.02, 0.035, 0.0, *[1.0] * 29], [-0.06, -0.06, 0.0, *[-0.02] * 29])
    assert screening.lowest(worse, candidates) == [(2, 0.0)] and worse.asked == [2, 1]
    assert screening.exactly == 32 + 3 + 5 + 3
    seven = Rough([0.001 * n for n in range(7)] + [1.0] * 25, [-0.02] * 32)
    found = screening.lowest(seven, candidates, 7)
    assert [index for index, _ in found] == list(range(7)) and seven.asked == [7]
    two = Rough([0.5, 0.25, *[1.0] * 30], [0.0] * 32)
    assert screening.lowest(two, candidates, 2) == [(1, 0.25), (0, 0.5)]


def test_a_first_step_scores_some_of_many_candidates_from_the_best_to_the_worst():
    candidates = torch.arange(320)[:, None]
    first = Rough([float(n) for n in range(320)], [-0.01, -0.03] * 160)
    screening = Screening()
    assert screening.lowest(first, candidates) == [(0, 0.0)] and first.asked == [32]
    middle = Rough([abs(n - 5.4) for n in range(320)], [0.0] * 320)
    assert Screening().lowest(middle, candidates) == [(5, pytest.approx(0.4))]


def test_a_screening_finds_the_exact_winner_and_leaves_the_model_as_it_was(qwen):
    slot, rough = slot_of(qwen), RoughModel(qwen)
    before = {n: (p.data_ptr(), p.dtype) for n, p in qwen.model.named_parameters()}
    objective, drawn = candidates_of(qwen, slot, width=120)
    objective = TargetLoss(qwen, slot, rough=rough)
    objective.share(torch.tensor(slot.initial_ids))
    screening, scored = Screening(), 0
    for part in drawn.split(30):
        exact = objective.losses(part)
        ((winner, loss),) = screening.lowest(objective, part)
        assert winner == int(exact.argmin()) and loss == pytest.approx(float(exact.min()), abs=1e-6)
        bounds = objective.scorer.bounds(objective.scorer.hidden(list(part)))
        assert not torch.equal(objective.rough_losses(part), bounds)  # it is rough
        scored += len(part)
    assert screening.exactly < scored
    after = {n: (p.data_ptr(), p.dtype) for n, p in qwen.model.named_parameters()}
    assert after == before
    assert rough_copy(rough_like(qwen, torch.bfloat16)) is None


def rough_like(loaded, dtype):
    """The model in another precision."""
    return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model).to(dtype))


def test_a_screened_search_is_gcg_and_a_saved_one_goes_on_to_the_bit(qwen):
    slot, allowed, saved = slot_of(qwen), allowed_of(qwen), []
    config = dataclasses.replace(SMALL, num_steps=4, search_width=30)

    def loss_of():
        return TargetLoss(qwen, slot, rough=RoughModel(qwen))

    def keep(state):
        saved.append(json.loads(json.dumps(state.to_row())))

    exact = run_gcg(TargetLoss(qwen, slot), slot, config, allowed, seed=3)
    whole = run_gcg(loss_of(), slot, config, allowed, seed=3, screened=True, on_step=keep)
    assert whole.best_ids == exact.best_ids
    assert whole.losses == pytest.approx(exact.losses, abs=1e-6)
    assert whole.screening.exactly < sum(whole.scored) and exact.screening is None
    state = GCGState(**saved[1])
    again = run_gcg(loss_of(), slot, config, allowed, seed=3, state=state)
    assert json.dumps(again.to_row()) == json.dumps(whole.to_row())


@pytest.mark.parametrize(
    "options", [{}, {"screened": True}, {"merge": 4}, {"screened": True, "merge": 3}]
)
def test_what_is_chosen_was_scored_exactly_and_keeps_its_tokens(tiny, options):
    slot = slot_of(tiny)
    _, drawn = candidates_of(tiny, slot, width=20)
    objective = TargetLoss(tiny, slot, rough=RoughModel(tiny))
    objective.share(torch.tensor(slot.initial_ids))
    drawn = drawn[torch.tensor(slot.faithful(drawn.tolist()))]
    suffix = torch.tensor(slot.initial_ids)
    screening = Screening() if options.get("screened") else None
    given = {"merge": options.get("merge", 0), "draft": None, "screening": screening}
    ids, loss = choose(objective, slot, suffix, drawn, generator=torch.Generator(), **given)
    assert loss == pytest.approx(float(objective.losses(torch.tensor([ids]))[0]), abs=1e-5)
    assert slot.faithful([ids]) == [True]
    if "merge" in options:
        assert loss <= float(objective.losses(drawn).min()) + 1e-6


def test_momentum_is_the_running_mean_and_a_saved_state_goes_on_to_the_bit(qwen, monkeypatch):
    slot, allowed = slot_of(qwen), allowed_of(qwen)
    config = dataclasses.replace(SMALL, num_steps=4, momentum=0.25)
    raw, used, saved = [], [], []
    objective = TargetLoss(qwen, slot)
    gradient = objective.token_gradient

    def seen(suffix):
        loss, found = gradient(suffix)
        raw.append(found)
        return loss, found

    monkeypatch.setattr(objective, "token_gradient", seen)
    from attacks import gcg_search as gcg

    sample = gcg.sample_candidates
    monkeypatch.setattr(
        gcg,
        "sample_candidates",
        lambda s, g, a, **k: used.append(g.clone()) or sample(s, g, a, **k),
    )

    def copied(state):
        return GCGState(
            **{k: list(v) if isinstance(v, list) else v for k, v in state.to_row().items()}
        )

    whole = run_gcg(
        objective, slot, config, allowed, seed=7, on_step=lambda s: saved.append(copied(s))
    )
    assert torch.equal(used[0], raw[0])
    assert torch.allclose(used[1], 0.25 * raw[0] + 0.75 * raw[1])
    assert torch.allclose(used[2], 0.25 * used[1] + 0.75 * raw[2])
    again = run_gcg(TargetLoss(qwen, slot), slot, config, allowed, seed=7, state=saved[1])
    assert again.to_row() == whole.to_row()


def test_a_draft_model_with_another_vocabulary_is_refused_and_its_own_serves(
    tmp_path, qwen, tiny_folders
):
    with pytest.raises(AttackPlaneError, match="vocabulary"):
        draft_model(qwen, load(str(tiny_folders["llama"]), "cpu"))
    config = dataclasses.replace(SMALL, draft=str(tiny_folders["qwen2"]))
    with RunFolder(tmp_path / "own") as run:
        found = cells(run, "gcg", config, behaviours(1), qwen)
        found.bench.open_model = ModelHandle
        artifact = found.attack(behaviours(1))[-1]
    assert artifact.token_fidelity and artifact.loss < artifact.loss_history[0]
    slot = slot_of(qwen)
    with pytest.raises(AttackPlaneError, match="draft"):  # never plain GCG under another name
        run_gcg(TargetLoss(qwen, slot), slot, config, allowed_of(qwen), seed=0)
