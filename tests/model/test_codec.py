"""The FLUX autoencoder: names of its file, latent convention, one image at a time, refusals.
Weights are random, of full size."""

import copy
import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from rounding import assert_as_near_as
from safetensors.torch import load_file, save_file
from small_runs import ARCHITECTURE

from uno_ds.model.architecture import Architecture
from uno_ds.model.codec import PixelCodec, build_codec, check_codec
from uno_ds.model.flux import FLUX_CONFIG, FLUX_FILE, FluxCodec, flux_name
from uno_ds.settings import SettingsError, build

FLUX = build(
    Architecture, {**ARCHITECTURE, "codec": "flux", "codec_downsample": 8, "latent_channels": 16}
)
# Of the published ae.safetensors: tensors, and bytes of fp32 values after the header.
TENSORS, VALUE_BYTES = 244, 335_278_732


@pytest.fixture(scope="module")
def autoencoder() -> torch.nn.Module:
    """diffusers' own module with random weights of which no two are alike, norms included."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    module = (
        AutoencoderKL.from_config(json.loads((FLUX_CONFIG / "config.json").read_text()))
        .eval()
        .requires_grad_(False)
    )
    for name, parameter in module.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.fixture(scope="module")
def precise(autoencoder: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(autoencoder).double()


@pytest.fixture(scope="module")
def base(autoencoder: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights under the names of the FLUX code, attention as 1 x 1
    convolutions."""
    folder = tmp_path_factory.mktemp("base")
    tensors = {
        flux_name(name): tensor[..., None, None] if ".to_" in name and tensor.dim() == 2 else tensor
        for name, tensor in autoencoder.state_dict().items()
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FLUX_FILE)
    return folder


@pytest.fixture(scope="module")
def codec(base: Path) -> FluxCodec:
    return build_codec(FLUX, base)


def images(count: int, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_names_and_sizes_are_those_of_the_published_file(base: Path):
    """One name of each kind; the next test covers every tensor, but through a converter that is
    lenient about names."""
    tensors = load_file(base / FLUX_FILE)
    assert (
        len(tensors) == TENSORS
        and sum(tensor.numel() * 4 for tensor in tensors.values()) == VALUE_BYTES
    )
    for name in (
        "encoder.down.0.block.0.norm1.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down.2.downsample.conv.bias",
        "encoder.mid.attn_1.q.weight",
        "encoder.mid.block_2.conv2.bias",
        "encoder.norm_out.weight",
        "decoder.up.3.block.2.conv1.weight",
        "decoder.up.0.block.0.nin_shortcut.bias",
        "decoder.up.1.upsample.conv.weight",
        "decoder.mid.attn_1.proj_out.bias",
    ):
        assert name in tensors
    assert tensors["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1) and tensors[
        "decoder.conv_in.weight"
    ].shape == (512, 16, 3, 3)
    assert tensors["decoder.up.0.block.0.conv1.weight"].shape == (128, 256, 3, 3)


def test_the_file_is_read_as_diffusers_own_converter_reads_it(
    base: Path, codec: FluxCodec, autoencoder: torch.nn.Module
):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_single_file(
        str(base / FLUX_FILE), config=str(FLUX_CONFIG), local_files_only=True
    ).state_dict()
    ours, made = codec.autoencoder.state_dict(), autoencoder.state_dict()
    assert theirs.keys() == ours.keys() == made.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]) and torch.equal(tensor, made[name]), name


def test_latents_are_the_shifted_and_scaled_mean_of_the_posterior(
    codec: FluxCodec, autoencoder: torch.nn.Module, precise: torch.nn.Module
):
    pixels = images(2)
    moments = torch.cat([autoencoder.encoder(image[None]) for image in pixels])
    latents = codec.encode(pixels)
    assert latents.shape == (2, 16, 4, 6)
    exact = torch.cat([precise.encoder(image[None].double()) for image in pixels])
    assert_as_near_as(
        latents, 0.3611 * (moments[:, :16] - 0.1159), 0.3611 * (exact[:, :16] - 0.1159)
    )
    assert torch.equal(latents, codec.encode(pixels)), "a latent is a function of its image"


def test_decode_undoes_shift_and_scale(
    codec: FluxCodec, autoencoder: torch.nn.Module, precise: torch.nn.Module
):
    latents = torch.randn(2, 16, 2, 3, generator=torch.Generator().manual_seed(2))
    pictures = codec.decode(latents)
    assert pictures.shape == (2, 3, 16, 24)
    expected = torch.cat(
        [autoencoder.decoder(latent[None] / 0.3611 + 0.1159) for latent in latents]
    )
    exact = torch.cat(
        [precise.decoder(latent[None].double() / 0.3611 + 0.1159) for latent in latents]
    )
    assert_as_near_as(pictures, expected, exact)


def test_a_latent_does_not_depend_on_the_rest_of_the_batch_bit_for_bit(codec: FluxCodec):
    pixels = images(3)
    together = codec.encode(pixels)
    assert all(
        torch.equal(together[number : number + 1], codec.encode(pixels[number : number + 1]))
        for number in range(3)
    )


def test_the_codec_is_frozen_and_leaves_no_graph(codec: FluxCodec):
    assert not any(parameter.requires_grad for parameter in codec.autoencoder.parameters())
    assert not codec.encode(images(1).requires_grad_()).requires_grad


def test_bf16_is_a_choice_and_latents_come_in_the_type_of_the_pixels(base: Path, codec: FluxCodec):
    half = build_codec(FLUX, base, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in half.autoencoder.parameters()} == {torch.bfloat16}
    latents, exact = half.encode(images(1)), codec.encode(images(1))
    assert latents.dtype == torch.float32
    assert 0 < (latents - exact).norm() / exact.norm() < 0.05


def test_nothing_asks_the_network(base: Path, monkeypatch: pytest.MonkeyPatch):
    import socket

    def refuse(*_):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    build_codec(FLUX, base)


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda tensors: tensors.pop("decoder.up.3.block.2.conv1.weight"),
            "decoder.up.3.block.2.conv1.weight is missing",
        ),
        (
            lambda tensors: tensors.update({"encoder.conv_in.weight": torch.zeros(64, 3, 3, 3)}),
            "encoder.conv_in.weight has shape [64, 3, 3, 3] instead of [128, 3",
        ),
        (lambda tensors: tensors.clear(), "(and 241 more)"),
    ],
)
def test_a_file_that_is_not_the_flux_autoencoder_is_one_line(
    base: Path, tmp_path: Path, damage, words
):
    tensors = load_file(base / FLUX_FILE)
    damage(tensors)
    save_file(tensors, tmp_path / FLUX_FILE)
    for refuses in (lambda: check_codec(FLUX, tmp_path), lambda: build_codec(FLUX, tmp_path)):
        with pytest.raises(SettingsError) as caught:
            refuses()
        assert (
            caught.value.key == "model.base"
            and words in str(caught.value)
            and "\n" not in str(caught.value)
        )


def test_a_missing_or_broken_file_and_a_shape_that_is_not_flux_are_one_line(tmp_path: Path):
    with pytest.raises(SettingsError, match="ae.safetensors does not exist"):
        check_codec(FLUX, tmp_path)
    (tmp_path / FLUX_FILE).write_bytes(b"no header")
    with pytest.raises(SettingsError, match="not a readable safetensors file"):
        check_codec(FLUX, tmp_path)
    with pytest.raises(SettingsError, match="reads its weights from model.base"):
        check_codec(FLUX, None)
    with pytest.raises(SettingsError, match="16 channels and 8 pixels"):
        check_codec(build(Architecture, {**ARCHITECTURE, "codec": "flux"}), tmp_path)


def test_the_pixel_codec_needs_only_its_shape():
    assert isinstance(build_codec(build(Architecture, ARCHITECTURE)), PixelCodec)


def test_latents_do_not_depend_on_the_linear_that_zero3_puts_in_torchs_place(
    codec: FluxCodec, monkeypatch
):
    before = codec.encode(images(1))
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    assert torch.equal(codec.encode(images(1)), before)
