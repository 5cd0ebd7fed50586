"""Cross entropy of the language head in chunks, RMSNorm and SwiGLU: what is computed, what is held,
and what is said when a backend is missing."""

import importlib.util
from importlib.metadata import version

import pytest
import torch
from kernel_checks import DEVICE, PeakBytes, assert_as_exact_as_torch, forward_and_gradients

from uno_ds.kernels import backends
from uno_ds.kernels.backends import backend_names
from uno_ds.kernels.cross_entropy import chunked, linear_cross_entropy
from uno_ds.kernels.pointwise import rms_norm, swiglu
from uno_ds.kernels.selection import KernelSettings
from uno_ds.model.experts import LanguageHead
from uno_ds.settings import SettingsError

VOCABULARY, HIDDEN = 50, 16
# The interpreter of Triton 3.6 cannot run loops whose bounds are arguments, as liger's are, beside
# numpy 2.4.
missing_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None
    or DEVICE == "cpu"
    and version("triton").startswith("3.6"),
    reason="needs liger-kernel, and on a CPU Triton 3.9",
)
FUSED = ["chunked", pytest.param("liger", marks=missing_liger)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 rows of logits at a time."""
    monkeypatch.setattr(chunked, "LOGITS_BYTES", 7 * 4 * VOCABULARY)


def make_inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden rows and weights in fp64 with values that bf16 holds, and labels; row 0 is certain of
    its label, row 1 that it is another."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, HIDDEN), (VOCABULARY, HIDDEN))
    )
    labels = torch.randint(VOCABULARY, (rows,), generator=generator)
    if rows > 2:
        hidden[0], hidden[1] = 3 * weight[labels[0]], -3 * weight[labels[1]]
    return (
        hidden.bfloat16().double().to(DEVICE),
        weight.bfloat16().double().to(DEVICE),
        labels.to(DEVICE),
    )


def run(rows: int, dtype: torch.dtype, backend: str, trained: bool) -> list[torch.Tensor]:
    hidden, weight, labels = make_inputs(rows)
    upstream = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        DEVICE
    )
    return forward_and_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, backend),
        [hidden.to(dtype), weight.to(dtype)],
        [True, trained],
        upstream,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 23])
@pytest.mark.parametrize("backend", FUSED)
def test_loss_and_gradients_are_as_exact_as_torchs(backend, rows, trained, dtype):
    assert_as_exact_as_torch(
        run(rows, dtype, backend, trained),
        run(rows, dtype, "reference", trained),
        run(rows, torch.float64, "reference", trained),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("backend", FUSED)
def test_loss_and_gradients_are_as_exact_as_torchs_in_bf16(backend, trained):
    assert_as_exact_as_torch(
        *(
            run(500, *way, trained)
            for way in (
                (torch.bfloat16, backend),
                (torch.bfloat16, "reference"),
                (torch.float64, "reference"),
            )
        )
    )


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_equal_finite_differences(backend, trained):
    hidden, weight, labels = make_inputs(9)
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, labels, backend),
        (hidden.requires_grad_(), weight.requires_grad_(trained)),
    )


def test_with_a_frozen_head_no_gradient_of_the_weight_and_no_whole_logits_are_ever_held(
    monkeypatch,
):
    hidden, weight, labels = (x.float() if x.is_floating_point() else x for x in make_inputs(200))
    one_chunk = 7 * VOCABULARY * 4
    with PeakBytes(monkeypatch) as memory:
        chunked.forward(hidden, weight, labels, False, True)
    assert (
        memory.largest == max(hidden.nbytes, one_chunk)
        and memory.peak <= hidden.nbytes + 200 * 4 + 5 * one_chunk
    )
    with PeakBytes(monkeypatch) as memory:
        chunked.backward(torch.ones(200, device=DEVICE), hidden, weight, labels, False, True)
    assert memory.peak <= hidden.nbytes + 2 * weight.nbytes + 6 * one_chunk


def test_with_a_frozen_head_backward_makes_no_logits_and_keeps_no_weight(monkeypatch):
    hidden, weight, labels = (x.float() if x.is_floating_point() else x for x in make_inputs(20))
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    kept = loss.grad_fn.saved_tensors if hasattr(loss.grad_fn, "saved_tensors") else ()
    assert [list(x.shape) for x in kept] == [[20, HIDDEN]]
    monkeypatch.setattr(chunked, "_chunks", None)
    loss.sum().backward()
    assert hidden.grad.any()


def test_without_gradients_none_are_made(monkeypatch):
    hidden, weight, labels = make_inputs(9)
    monkeypatch.setattr(torch, "mm", None)
    for frozen in (hidden, hidden.requires_grad_()):
        with torch.no_grad():
            linear_cross_entropy(frozen, weight.requires_grad_(), labels)


def test_strided_rows_get_their_gradient():
    hidden, weight, labels = make_inputs(6)
    wide = torch.zeros(6, 40, dtype=torch.float64, device=DEVICE)
    wide[:, 5:21] = hidden
    wide.requires_grad_()
    linear_cross_entropy(wide[:, 5:21], weight, labels).sum().backward()
    (expected,) = torch.autograd.grad(
        linear_cross_entropy(hidden.requires_grad_(), weight, labels, "reference").sum(), hidden
    )
    torch.testing.assert_close(wide.grad[:, 5:21], expected)
    assert wide.grad.count_nonzero() == expected.count_nonzero()


@pytest.mark.parametrize("at_once, trained", [(True, False), (False, True)])
def test_the_operator_is_registered_as_torch_wants_it(at_once, trained):
    hidden, weight, labels = make_inputs(9)
    torch.library.opcheck(
        torch.ops.uno_ds.linear_cross_entropy.default,
        (hidden.requires_grad_(), weight.requires_grad_(trained), labels, False, at_once),
    )


def test_torch_compile_takes_it_as_one_graph():
    hidden, weight, labels = make_inputs(9)
    hidden.requires_grad_()
    compiled = torch.compile(
        lambda x: linear_cross_entropy(x, weight, labels).sum(), fullgraph=True, backend="aot_eager"
    )
    for ours, theirs in zip(
        torch.autograd.grad(compiled(hidden), hidden),
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).sum(), hidden),
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", backend_names("cross_entropy"))
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, w, y: (x[:, :-1], w, y), r"\[9, 15\], \[50, 16\], \[9\]"),
        (lambda x, w, y: (x, w, y[:-1]), r"\[8\]"),
        (lambda x, w, y: (x, w.float(), y), "torch.float64, torch.float32"),
        (lambda x, w, y: (x, w, y.int()), "labels int64; got .*int32"),
    ],
)
def test_what_does_not_fit_is_a_sentence(backend, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        linear_cross_entropy(*change(*make_inputs(9)), backend)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_an_unknown_backend_is_a_sentence():
    with pytest.raises(ValueError, match="'auto'; allowed are reference, chunked, liger"):
        linear_cross_entropy(*make_inputs(2), "auto")
    for call in (
        lambda: rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6, "auto"),
        lambda: swiglu(torch.ones(2), torch.ones(2), "auto"),
    ):
        with pytest.raises(ValueError, match="'auto'; allowed are reference, liger"):
            call()
    with pytest.raises(ValueError, match=r"must be \[4\] .* got \[3\]"):
        rms_norm(torch.ones(2, 4), torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match=r"must have one shape and dtype; got \[2\] .* and \[3\]"):
        swiglu(torch.ones(2), torch.ones(3))


def test_the_language_head_gives_logits_or_losses_with_one_weight():
    head = LanguageHead(HIDDEN, VOCABULARY, "chunked").double().to(DEVICE)
    hidden, _, labels = make_inputs(9)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    expected = torch.nn.functional.cross_entropy(head(hidden), labels, reduction="none")
    torch.testing.assert_close(head(hidden, labels), expected)


@pytest.mark.parametrize("kernel", ["cross_entropy", "pointwise"])
def test_liger_that_is_asked_for_and_missing_is_one_sentence(kernel, monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else object()
    )
    with pytest.raises(
        SettingsError,
        match=f"^kernels.{kernel}: 'liger' cannot run here: the package liger-kernel is not "
        "installed, .*cuda",
    ) as caught:
        KernelSettings(**{kernel: "liger"}).resolved()
    assert "\n" not in str(caught.value)


def test_auto_says_what_it_means_here_and_never_names_a_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = {
        "attention": "sdpa",
        "regression": "reference",
        "norm_rope": "reference",
        "cross_entropy": "chunked",
        "pointwise": "reference",
        "experts": "separate",
    }
    assert KernelSettings().resolved().backends == plain
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    fused = {name: kernel.on_gpu[0] for name, kernel in backends.KERNELS.items()}
    assert KernelSettings().resolved().backends == fused and "liger" in fused.values()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    # Torch has a varlen attention of its own.
    assert KernelSettings().resolved().backends == plain | {"attention": "flash"}


@pytest.mark.skipif(DEVICE == "cuda", reason="says what happens without a GPU")
def test_pointwise_liger_without_a_gpu_is_a_sentence():
    for call in (
        lambda: rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6, "liger"),
        lambda: swiglu(torch.ones(2), torch.ones(2), "liger"),
    ):
        with pytest.raises(ValueError, match="needs a CUDA device; got tensors on cpu"):
            call()


@pytest.mark.gpu
@missing_liger
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 1001])
def test_pointwise_liger_is_as_exact_as_torch(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    x, other = (
        torch.randn(rows, 3584, generator=generator, dtype=torch.float64).bfloat16().double().cuda()
        for _ in range(2)
    )
    weight = (
        (0.5 + torch.rand(3584, generator=generator, dtype=torch.float64))
        .bfloat16()
        .double()
        .cuda()
    )
    upstream = (
        torch.randn(rows, 3584, generator=generator, dtype=torch.float64).bfloat16().double().cuda()
    )
    ways = ((dtype, "liger"), (dtype, "reference"), (torch.float64, "reference"))
    assert_as_exact_as_torch(
        *(
            forward_and_gradients(
                lambda x, w, backend=backend: rms_norm(x, w, 1e-6, backend),
                [x.to(to), weight.to(to)],
                [True, True],
                upstream,
            )
            for to, backend in ways
        ),
        "rms_norm",
    )
    # Liger writes gradients over gate and up.
    assert_as_exact_as_torch(
        *(
            forward_and_gradients(
                lambda x, y, backend=backend: swiglu(x * 1, y * 1, backend),
                [x.to(to), other.to(to)],
                [True, True],
                upstream,
            )
            for to, backend in ways
        ),
        "swiglu",
    )
