"""BAGEL's names of the model's tensors: each has one of its own, and nothing else has one."""

import pytest
import torch

from uno_ds.model.architecture import packaged, read_architecture
from uno_ds.model.weights import bagel_name, meta_tensors


def test_every_tensor_of_the_model_has_a_name_of_its_own():
    names = list(meta_tensors(read_architecture(packaged("tiny_base"))))
    assert len(names) > 50 and len({bagel_name(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.gen.router.weight",
        "layers.0.und.q_proj_again.weight",
        "layers.0.mid.q_proj.weight",
        "layers.0.weight",
        "vit.layers.0.rope.weight",
        "vit.layers.0.fc3.weight",
        "latent_positions.weight",
        "vae2llm2.weight",
        "time_embedder.weight",
        "metaqueries",
        "",
    ],
)
def test_a_name_that_the_model_does_not_have_raises(name):
    with pytest.raises(ValueError, match=f"^The model has no tensor '{name}'"):
        bagel_name(name)


def test_a_projection_under_an_adapter_has_the_name_of_the_projection():
    assert (
        bagel_name("layers.3.gen.q_proj.base_layer.weight")
        == "language_model.model.layers.3.self_attn.q_proj_moe_gen.weight"
    )
    with torch.device("meta"), pytest.raises(ValueError):
        bagel_name("layers.3.gen.q_proj.lora_A.default.weight")
