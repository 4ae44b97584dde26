"""On a CUDA device: the fast paths against the plain ones, bfloat16, and a real out-of-memory."""

import pytest
import torch

from attacks.candidates import allowed_tokens, sample_candidates
from attacks.likelihood import plain_loss
from attacks.objective import TargetLoss
from core.generate import complete
from core.models import load
from core.prompt import Conversation, Renderer
from geometry.activations import collect
from tests.conftest import FAMILIES
from tests.test_gcg import candidates_of, run_attacker, slot_of
from tests.test_geometry import REQUESTS, prompts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=list(FAMILIES))
def on_gpu(request, tiny_folders):
    return load(f"{tiny_folders[request.param]}?dtype=float32", "cuda")


def test_losses_and_gradient_on_the_gpu_equal_those_on_the_cpu(on_gpu, tiny_models):
    family = on_gpu.spec.partition("?")[0].rpartition("/")[2]
    cpu = tiny_models[family]
    slot = slot_of(cpu)
    objective, drawn = candidates_of(cpu, slot)
    other = TargetLoss(on_gpu, slot)
    assert other.path == "packed"
    assert torch.allclose(other.losses(drawn), objective.losses(drawn), atol=1e-4)
    assert other.best(drawn)[0] == int(objective.losses(drawn).argmin())
    (_, a), (_, b) = objective.token_gradient(drawn[0]), other.token_gradient(drawn[0].cuda())
    assert torch.allclose(a, b.cpu(), atol=1e-4)


def test_residuals_and_replies_on_the_gpu_equal_those_on_the_cpu(on_gpu, tiny_models):
    cpu = tiny_models[on_gpu.spec.partition("?")[0].rpartition("/")[2]]
    a, b = (collect(m, prompts_of(m), REQUESTS).resid for m in (cpu, on_gpu))
    assert (a - b).abs().max() < 1e-3
    text = [Renderer(cpu).text(Conversation.build(r)) for r in REQUESTS]
    assert complete(Renderer(cpu), text, max_new_tokens=4) == complete(
        Renderer(on_gpu), text, max_new_tokens=4
    )


def test_the_default_dtype_is_bfloat16_and_attacks_run_in_it(tmp_path, tiny_folders):
    loaded = load(str(tiny_folders["qwen2"]))
    assert loaded.dtype == torch.bfloat16
    artifacts = run_attacker(tmp_path, loaded, count=1)
    assert artifacts[-1].token_fidelity and artifacts[-1].loss <= artifacts[-1].loss_history[0]


def test_a_real_out_of_memory_halves_the_batch(tiny_folders):
    loaded = load(f"{tiny_folders['qwen2']}?dtype=float32", "cuda")
    slot = slot_of(loaded)
    objective = TargetLoss(loaded, slot)
    suffix = torch.tensor(slot.initial_ids)
    _, gradient = objective.token_gradient(suffix.cuda())
    drawn = sample_candidates(
        suffix,
        gradient,
        allowed_tokens(loaded.tokenizer, loaded.embedding_table.shape[0]),
        topk=200,
        width=512,
        n_replace=2,
        generator=torch.Generator().manual_seed(0),
    )
    objective.batch.value = 512
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / total)
    try:
        losses = objective.losses(drawn)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert objective.batch.value < 512
    prompt = (*slot.before_ids, *drawn[5].tolist(), *slot.after_ids)
    assert float(losses[5]) == pytest.approx(plain_loss(loaded, prompt, slot.target_ids), abs=1e-4)
