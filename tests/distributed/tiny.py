"""A model of 2 layers and a fixed list of samples, made alike in the test and on every rank."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rounding import rounding
from small_runs import ARCHITECTURE, IMAGES, copy_tokenizer

from uno_ds.data.layouts.conversation import conversation_sample
from uno_ds.data.layouts.edit import edit_sample
from uno_ds.data.layouts.interleaved import ImagePiece, TextPiece, interleaved_sample
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.model.architecture import write_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import build_codec
from uno_ds.model.weights import write_weights
from uno_ds.objectives.regression_target import open_encoder, target_source
from uno_ds.objectives.uno import LOSSES, UnoObjective
from uno_ds.recipe import Recipe, merge
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.composition import ImageViews, SampleComposer, SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Sample
from uno_ds.settings import build
from uno_ds.training.deepspeed_file import DS_CONFIGS
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.sharded_objective import initialise

# What one row of an output sums over on its way: in each layer norms, projections, MLP (32 and 64
# wide), scores (8) and at most 150 keys; then the head, or the latents' 48 values. Backward goes
# the same way again.
ROW_SUMS = [32, 32, 8, 150, 32, 32, 32, 64] * ARCHITECTURE["layers"] + [32, 48]
# Losses and gradients are means over rows, at least 50 of a kind, whose errors are independent.
ROWS = 50
LOSS_ROUNDING = rounding(torch.float32, *ROW_SUMS) / ROWS**0.5
GRADIENT_ROUNDING = 2 * LOSS_ROUNDING
CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
SPECIAL = SpecialTokens(bos=0, eos=1, start_of_image=2, end_of_image=3)
WIDEST_KEPT_WHOLE = 100


def parameter_rounding(steps: int, lr: float) -> float:
    """A step of AdamW moves an entry by up to `lr`, and rounding moves it by the share that the
    entry's gradient is off: its error is relative to the largest of its tensor, which is taken to
    be 8 times as large. An eps of 1e-3 holds smaller ones down."""
    return steps * lr * 8 * GRADIENT_ROUNDING


def recipe(**changes: Any) -> Recipe:
    """Losses of every kind, no random choice in the layout, fp32."""
    tree = {
        "name": "tiny_test",
        "steps": 1000,
        "seed": 3,
        "model": {"architecture": dict(ARCHITECTURE), "tokenizer": "tiny_base"},
        "objective": {
            "flow_weight": 1.0,
            "caption_weight": 0.3,
            "regression_weight": 0.5,
            "answer_weight": 0.2,
        },
        "sequence": {
            "token_budget": 4096,
            "metaquery_grid": 2,
            "drop_text": 0,
            "drop_vit": 0,
            "drop_latent": 0,
        },
        "data": {
            "sources": [{"path": "scenes/t2i"}],
            "latent_image": dict(IMAGES),
            "vit_image": dict(IMAGES),
        },
        "engine": {"precision": "fp32"},
    }
    return build(Recipe, merge(tree, changes))


def sharded_config(name: str, folder: Path) -> str:
    """A copy of ds_configs/NAME.json under which ZeRO-3 gathers even this model's matrices: by the
    file's own threshold they are so small that every rank would keep them whole. Biases and norms
    stay below it."""
    config = json.loads((DS_CONFIGS / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    if "stage3_param_persistence_threshold" in zero:
        zero["stage3_param_persistence_threshold"] = WIDEST_KEPT_WHOLE
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return str(path)


class SampleList:
    """Samples of every task with random images, texts and noise; number n is the same in every
    process."""

    def __init__(self, settings: Recipe):
        self.settings, self.geometry = settings, settings.architecture.geometry

    def text_to_image(self, number: int, caption: bool = True, metaqueries: bool = True) -> Sample:
        rng = np.random.default_rng([number, 0])
        prompt, image = self._text(rng), self._image(rng)
        composer = self._composer(caption, metaqueries)
        return text_to_image_sample(composer, f"t2i:{number}", prompt, self._text(rng), image, rng)

    def edit(self, number: int, caption: bool = True, metaqueries: bool = True) -> Sample:
        rng = np.random.default_rng([number, 1])
        source, instruction, target = self._image(rng), self._text(rng), self._image(rng)
        composer = self._composer(caption, metaqueries)
        return edit_sample(
            composer, f"edit:{number}", source, instruction, self._text(rng), target, rng
        )

    def conversation(self, number: int, image: bool = True, answer: bool = True) -> Sample:
        """A question, about an image or not, and its answer, if there is one."""
        rng = np.random.default_rng([number, 2])
        view = [ImageViews(vit=self._image(rng).vit)] if image else []
        turns = [
            (False, [*view, self._text(rng)]),
            *([(True, [self._text(rng)])] if answer else []),
        ]
        return conversation_sample(self._composer(True, True), f"vlm:{number}", turns)

    def interleaved(self, number: int) -> Sample:
        """An image, a text, reasoning with a loss, and two images that are generated one after the
        other."""
        rng = np.random.default_rng([number, 3])
        first, second = self._image(rng), self._image(rng)
        pieces = [
            ImagePiece(self._image(rng)),
            TextPiece(self._text(rng)),
            TextPiece(self._text(rng), loss=True),
            ImagePiece(first, first, self._text(rng)),
            TextPiece(self._text(rng)),
            ImagePiece(second, second),
        ]
        return interleaved_sample(self._composer(True, True), f"parts:{number}", pieces, rng)

    def collate(self, samples: list[Sample]) -> PackedBatch:
        everything, stop = (
            self.settings.model.train == "all",
            self.settings.sequence.context_gradient == "stop",
        )
        return Collator(
            self.geometry,
            SPECIAL,
            train_understanding=everything,
            stop_at_context=stop,
            targets=target_source(self.settings.objective),
        )(samples)

    def _composer(self, captions: bool, metaqueries: bool) -> SampleComposer:
        return SampleComposer(
            self.settings.sequence,
            self.geometry,
            SPECIAL,
            captions=captions,
            metaqueries=metaqueries,
        )

    def _text(self, rng: np.random.Generator) -> list[int]:
        return rng.integers(4, ARCHITECTURE["vocabulary"], size=rng.integers(3, 14)).tolist()

    def _image(self, rng: np.random.Generator) -> ImageViews:
        height, width = (int(side) for side in 8 * rng.integers(2, 5, size=2))
        return ImageViews(latent=_pixels(rng, height, width), vit=_pixels(rng, height, width))


def _pixels(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.uniform(-1, 1, size=(3, height, width)).astype(np.float32)


def plain_objective(settings: Recipe, read_answers: bool = True) -> UnoObjective:
    """The objective with the engine's initial weights, in this process, without DeepSpeed."""
    shape, kernels = settings.architecture, settings.kernels.resolved()
    model = Bagel(
        shape,
        kernels.attention,
        settings.model.recompute,
        read_answers,
        kernels.norm_rope,
        kernels.pointwise,
        kernels.cross_entropy,
        kernels.experts,
    )
    objective = UnoObjective(
        model,
        build_codec(shape),
        settings.objective,
        kernels,
        settings.sequence.metaqueries,
        open_encoder(settings.objective, torch.device("cpu"), torch.float32),
    )
    objective.choose_trainable(settings.model.train, settings.lora)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            initialise(name, parameter, settings.seed)
    return objective


def plain_adamw(settings: Recipe, objective: UnoObjective) -> torch.optim.AdamW:
    chosen = settings.optimizer
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trainable,
        lr=chosen.lr,
        betas=tuple(chosen.betas),
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
    )


def counts_of(batches: list[PackedBatch], losses: Sequence[str] = LOSSES) -> torch.Tensor:
    """Tokens with each loss over all batches."""
    return torch.tensor(
        [sum(batch.loss_counts[name] for batch in batches) for name in losses], dtype=torch.float64
    )


def plain_step(
    objective: UnoObjective, optimizer: torch.optim.AdamW, batches: list[PackedBatch], clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total and the losses, norm of the gradient) of one optimizer step on all batches of the
    step."""
    optimizer.zero_grad()
    counts = counts_of(batches, objective.losses)
    losses = torch.zeros(1 + len(objective.losses), dtype=torch.float64)
    for batch in batches:
        total, parts = objective(batch, counts)
        total.backward()
        losses += torch.cat([total.detach()[None], parts]).double()
    norm = torch.nn.utils.clip_grad_norm_(
        [parameter for parameter in objective.parameters() if parameter.requires_grad], clip
    )
    optimizer.step()
    return losses, norm.detach()


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, relative: float, what: str) -> None:
    """Every entry within `relative`, and 1e-7 for those that are about 0."""
    torch.testing.assert_close(
        ours,
        theirs,
        rtol=relative,
        atol=1e-7,
        check_dtype=False,
        msg=lambda text: f"{what}: {text}",
    )


def write_home(
    folder: Path, tree: dict[str, Any], parameters: dict[str, torch.nn.Parameter]
) -> None:
    """A working directory with the recipe `tree`, which names `base` and `sharded.json` of it: a
    base of these weights, and a configuration that shards all of it."""
    write_weights(folder / "base", parameters, parameters.__getitem__)
    write_architecture(recipe().architecture, folder / "base")
    copy_tokenizer(folder / "base")
    zero = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 100,
    }
    (folder / "sharded.json").write_text(json.dumps({"zero_optimization": zero}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))


def full_parameters(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full tensor on the CPU), weights and buffers, one at a time. Collective: every rank
    has to exhaust it."""
    for name, parameter in [*engine.named_parameters(), *engine.objective.named_buffers()]:
        yield name, engine.full_parameter(parameter)


def full_average(ema: Ema) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full fp32 average on the CPU), one parameter at a time. Collective."""
    for name in ema.parameters:
        yield name, ema.gather(name)
