"""Our model, sequence and losses reproduce tensors of the public BAGEL code (fp32, 1e-4 relative)."""
import pytest
import torch

from golden import load_case
from uno_ds.model.weights import bagel_name
from uno_ds.objectives.captioning import captioning_loss
from uno_ds.objectives.flow_matching import flow_matching_loss, noise_latents

CASES = ["flow_and_vlm", "caption_on_noised_latents"]


def close(ours: torch.Tensor, golden: torch.Tensor, what: str) -> None:
    error = (ours.double() - golden.double()).abs().max() / golden.double().abs().max()
    assert error < 1e-4, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_mask_equals_the_public_codes(name):
    case = load_case(name)
    plan, order = case.batch.live_plan, case.batch.order_T
    visible = torch.zeros(len(order), len(order), dtype=torch.bool)
    visible[order[:, None], order[None, :]] = torch.cat([case.batch.context_plan.visible(), plan.visible()])
    start = 0
    for number, sample in enumerate(case.samples):
        rows = slice(start, start + sample.length)
        assert torch.equal(visible[rows, rows], case.tensors[f"attention_allowed.sample{number}"].bool())
        visible[rows, rows] = False
        start += sample.length
    assert not visible.any(), "samples see each other"


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_the_public_codes(name, backend):
    case = load_case(name)
    objective, batch, tensors = case.objective, case.batch, case.tensors
    for layer in objective.model.layers:
        layer.backend = backend
    latents, velocity = noise_latents(objective._latent_rows(batch), batch)
    understanding, generation, _ = objective.model(batch, latents, torch.zeros(0, objective.model.shape.hidden))
    hidden = torch.empty_like(tensors["last_hidden_state"])
    hidden[batch.order_T] = torch.cat([understanding, generation])
    close(hidden, tensors["last_hidden_state"], "last_hidden_state")

    per_row = (objective.model.llm2vae(generation[batch.noised_N]) - velocity).square()
    close(per_row, tensors["mse_per_token"], "mse_per_token")
    close(flow_matching_loss(objective.model.llm2vae(generation[batch.noised_N]), velocity), tensors["mse_per_token"].mean(-1), "flow loss")
    rows = torch.cat([batch.caption_rows, batch.answer_rows])
    ce = captioning_loss(objective.model.lm_head, understanding[rows], torch.cat([batch.caption_labels, batch.answer_labels]))
    by_place = ce[batch.order_T[rows].argsort()]
    close(by_place, tensors["ce_per_token"], "ce_per_token")

    texts = len(batch.caption_rows) + len(batch.answer_rows)
    total, losses = objective(batch, torch.tensor([len(batch.noised_N), texts, 1, texts]))
    close(total, tensors["loss"], "loss")
    total.backward()
    golden_names = {key.removeprefix("grads.") for key in tensors if key.startswith("grads.")}
    checked = set()
    for ours, parameter in objective.model.named_parameters():
        theirs = bagel_name(ours)
        if theirs in golden_names:
            close(parameter.grad, tensors[f"grads.{theirs}"], theirs)
            checked.add(theirs)
        else:
            assert parameter.grad is None, f"{ours} has a gradient, but the public code's has none"
    assert checked == golden_names
