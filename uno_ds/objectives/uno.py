"""UNO: flow matching, captioning of the noised latents and metaquery regression, in one packed
forward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uno_ds.kernels.metaquery_regression.kinds import kind_names
from uno_ds.kernels.selection import KernelSettings
from uno_ds.model.adapters import LoraSettings, add_adapters
from uno_ds.model.bagel import Bagel, is_generation
from uno_ds.model.codec import Codec, latent_rows
from uno_ds.model.vision import one_thread
from uno_ds.model.vision_folder import FolderEncoder
from uno_ds.objectives.captioning import captioning_loss
from uno_ds.objectives.flow_matching import (
    flow_contrast_loss,
    flow_matching_loss,
    noise_latents,
)
from uno_ds.objectives.negatives import NEGATIVE_FORMS, negative_loss
from uno_ds.objectives.regression_target import REGRESSION_TARGETS, feature_rows, head_width
from uno_ds.objectives.visual_regression import (
    CONTRASTIVE,
    regression_module,
    regression_targets,
)
from uno_ds.ranges import Range, named_range
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.schedule import check_weight_by_t
from uno_ds.settings import SettingsError, setting

LOSSES = ("flow", "caption", "regression", "answer")
# Those that read noised latents.
UNDERSTANDING = ("caption", "regression", "negative")


@dataclass(frozen=True)
class ObjectiveSettings:
    flow_weight: float = setting(
        1.0,
        doc="Weight of flow matching.",
        minimum=1e-9,
        maximum=1e6,
        or_zero=True,
    )
    caption_weight: float = setting(
        0.1,
        doc="Weight of the caption read from the noised latents. 0: no caption is laid out.",
        minimum=1e-9,
        maximum=1e6,
        or_zero=True,
    )
    regression_weight: float = setting(
        0.5,
        doc="Weight of the metaquery regression. 0: no metaquery is laid out.",
        minimum=1e-9,
        maximum=1e6,
        or_zero=True,
    )
    answer_weight: float = setting(
        1.0,
        doc="Weight of the answers of question-answer samples. They reach the understanding expert "
        "only, so with train: generation this loss is reported and trains nothing.",
        minimum=1e-9,
        maximum=1e6,
        or_zero=True,
    )
    regression_target: str = setting(
        "vit",
        choices=tuple(REGRESSION_TARGETS),
        doc="vit: features of the visual encoder through a linear head; connector: its tokens "
        "after the connector, without a head; hog: orientation histograms and contrast, by "
        "program; encoder: features of the vision model in regression_encoder.",
    )
    regression_encoder: str | None = setting(
        None,
        doc="Folder of a vision model of transformers (DINOv2 and the like) for regression_target: "
        "encoder. It is frozen, whole on each rank, and in no checkpoint.",
    )
    regression_target_norm: str = setting(
        "none",
        choices=("none", "spatial"),
        doc="spatial: of the target's features the share regression_mean_share of the image's mean "
        "is subtracted, and they are divided by their deviation over the image's patches.",
    )
    regression_mean_share: float = setting(
        1.0,
        doc="Share of the image's mean feature that regression_target_norm: spatial subtracts.",
        minimum=0,
        maximum=1,
    )
    regression_loss: str = setting(
        "cosine",
        choices=(*kind_names(), CONTRASTIVE),
        doc="Distance of normalised prediction and target; contrastive: InfoNCE, the own target "
        "against those of all other metaqueries.",
    )
    regression_temperature: float = setting(
        0.07,
        doc="Temperature of the contrastive loss.",
        minimum=1e-3,
        maximum=100,
    )
    regression_negatives: str = setting(
        "pack",
        choices=("pack", "ranks"),
        doc="What the contrastive loss compares with: the targets of the pack, or of the packs of "
        "all ranks, which are gathered (the host waits for their counts; on one rank there are no "
        "others).",
    )
    supervise_until: float = setting(
        1.0,
        doc="Share of the run's steps after which understanding losses end: captions and "
        "metaqueries are no longer laid out, and a step costs what flow matching costs.",
        above=0,
        maximum=1,
    )
    supervision_decay: str = setting(
        "none",
        choices=("none", "cosine"),
        doc="cosine: the weights of the understanding losses fall to 0 at supervise_until, along a "
        "half cosine; none: they are constant until then.",
    )
    caption_weight_by_t: list[list[float]] = setting(
        factory=list,
        doc="Factor of the caption loss by noise level: a list of [t, weight], linear in between; "
        "where it is 0, no caption is laid out. Empty: 1.",
    )
    regression_weight_by_t: list[list[float]] = setting(
        factory=list, doc="The same of the metaquery regression."
    )
    flow_contrast: float = setting(
        0.0,
        doc="Contrastive flow matching: from the flow loss this many times the squared distance of "
        "the velocity to that of another image of the pack is subtracted. 0: none.",
        minimum=0,
        below=1,
    )
    negative_weight: float = setting(
        0.0,
        doc="Weight of negative captions: a second, wrong caption reads the same noised latents "
        "and must be less likely than the right one. 0: none is laid out.",
        minimum=1e-9,
        maximum=1e6,
        or_zero=True,
    )
    negative_source: str = setting(
        "column",
        choices=("column", "pack"),
        doc="Where negative captions come from. column: the column negative_captions of t2i rows, "
        "which the embedded scenes have; pack: the caption of an earlier sample of the pack.",
    )
    negative_margin: float = setting(
        0.5,
        doc="By how many nats a token the mean cross entropy of a negative caption must exceed "
        "that of the right one.",
        minimum=0,
        maximum=100,
    )
    negative_form: str = setting(
        "softplus",
        choices=tuple(NEGATIVE_FORMS),
        doc="Loss of what is missing to the margin: softplus, which never vanishes, or hinge.",
    )
    balance: str = setting(
        "none",
        choices=("none", "gradient_norm"),
        doc="gradient_norm: the weights of the understanding losses are scaled together, so that "
        "the norm of their gradient at the noised latents, after the first layer, has a given "
        "ratio to that of the flow loss.",
    )
    balance_ratio: float = setting(
        0.5,
        doc="Norm of the understanding losses' gradient over that of the flow loss.",
        minimum=1e-6,
        maximum=1e6,
    )
    balance_every: int = setting(
        100,
        doc="Steps between two measurements of that ratio, each of which takes two forward and "
        "backward passes.",
        minimum=1,
        maximum=10**9,
    )

    def __post_init__(self) -> None:
        if not any(self.weights.values()):
            raise SettingsError(
                "flow_weight", "all four loss weights are 0; at least one must be above 0."
            )
        for key in ("caption_weight_by_t", "regression_weight_by_t"):
            check_weight_by_t(key, getattr(self, key))

    def unsupervised(self) -> "ObjectiveSettings":
        """Of the steps after supervision ended: nothing of what is gone is set any more."""
        return ObjectiveSettings(
            flow_weight=self.flow_weight,
            flow_contrast=self.flow_contrast,
            answer_weight=self.answer_weight,
            caption_weight=0.0,
            regression_weight=0.0,
        )

    @property
    def weights(self) -> dict[str, float]:
        """Of every loss that the objective computes, in their order."""
        weights = {name: getattr(self, f"{name}_weight") for name in LOSSES}
        if self.flow_contrast:
            weights["contrast"] = -self.flow_weight * self.flow_contrast
        if self.negative_weight:
            weights["negative"] = self.negative_weight
        return weights

    @property
    def depending_on_packs(self) -> set[str]:
        """Losses of a sample that depend on the other samples of its pack."""
        return {"contrast", "regression"} if self.regression_loss == CONTRASTIVE else {"contrast"}

    @property
    def gathers_negatives(self) -> bool:
        return {"pack": False, "ranks": True}[self.regression_negatives]

    @property
    def used_negative_source(self) -> str:
        """ "" without negative captions."""
        return self.negative_source if self.negative_weight else ""


def weighted_sum(losses_T: torch.Tensor, weights_T: torch.Tensor | None) -> torch.Tensor:
    """The sum of losses times their weights; None: all are 1."""
    if weights_T is None:
        return losses_T.sum()
    return (losses_T * weights_T.to(losses_T.dtype)).sum()


class UnoObjective(nn.Module):
    """The module that the engine trains: the model, the metaquery embeddings and the regression
    head.

    Codec and `encoder` (of regression targets that need one) are attributes but no submodules: they
    are frozen and not sharded.
    """

    codec: Codec
    encoder: FolderEncoder | None

    def __init__(
        self,
        model: Bagel,
        codec: Codec,
        settings: ObjectiveSettings,
        kernels: KernelSettings,
        metaqueries: int,
        encoder: FolderEncoder | None = None,
    ):
        super().__init__()
        self.model = model
        self.settings = settings
        object.__setattr__(self, "codec", codec)
        object.__setattr__(self, "encoder", encoder)
        shape = model.shape
        # Names of the losses that `forward` returns.
        self.losses = tuple(settings.weights)
        # Factors of the losses' weights, by name. Replaced as a whole, never changed.
        self.scales: Mapping[str, float] = dict.fromkeys(self.losses, 1.0)
        self._loss_weights: tuple[Any, torch.Tensor] | None = None
        self.metaqueries = self.regression = None
        if settings.regression_weight and metaqueries:
            self.metaqueries = nn.Embedding(metaqueries, shape.hidden)
            self.regression = regression_module(
                settings, shape.hidden, head_width(settings, shape), kernels.regression
            )

    def forward(
        self, batch: PackedBatch, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted total, plain losses in the order of `losses`), each loss a sum over this
        batch's tokens divided by its entry of `counts`, the tokens of the whole step over all ranks
        and micro-batches."""
        with torch.no_grad():
            with named_range(Range.ENCODERS, "codec"):
                clean_GC = self.latent_rows(batch)
            latents_GC, velocity_XC = noise_latents(clean_GC, batch.latents)
        if self.metaqueries is None:
            metaqueries_MH = self.model.lm_head.weight.new_zeros(0, self.model.shape.hidden)
        else:
            metaqueries_MH = self.metaqueries(batch.metaqueries.index_M)
        outputs = self.model(batch, latents_GC, metaqueries_MH)
        with named_range(Range.LOSSES):
            return self._losses(batch, velocity_XC, counts, *outputs)

    def _losses(
        self,
        batch: PackedBatch,
        velocity_XC: torch.Tensor,
        counts: torch.Tensor,
        understanding_UH: torch.Tensor,
        generation_GH: torch.Tensor,
        vit_PW: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` returns, from the outputs of the model."""
        skipped = batch.context if not self.model.read_context else 0

        noised_XH = generation_GH[batch.latents.noised_X]
        predicted_XC = self.model.llm2vae(noised_XH)
        flow = flow_matching_loss(predicted_XC, velocity_XC).sum()

        rows_Y, labels_Y = batch.captions.rows_Y, batch.captions.labels_Y
        if "negative" in self.losses:
            rows_Y = torch.cat([rows_Y, batch.negatives.labels.rows_Y])
            labels_Y = torch.cat([labels_Y, batch.negatives.labels.labels_Y])
        entropy_Y = captioning_loss(
            self.model.lm_head, understanding_UH[rows_Y - skipped], labels_Y
        )
        caption_Y = entropy_Y[: len(batch.captions.rows_Y)]
        caption = caption_Y.sum()

        regression = weighted_regression = flow.new_zeros(())
        if self.regression is not None:
            with torch.no_grad():
                features_PW = feature_rows(
                    self.settings,
                    self.encoder,
                    vit_PW,
                    self.model.connector,
                    batch.vision,
                    batch.targets,
                )
                targets_MW = regression_targets(features_PW, batch.targets)
            queries_MH = understanding_UH[batch.metaqueries.rows_M - skipped]
            regression_M = self.regression(queries_MH, targets_MW)
            regression = regression_M.sum()
            weighted_regression = weighted_sum(regression_M, batch.metaqueries.weights_M)

        answer = flow.new_zeros(())
        if self.model.read_context:
            answers_YH = understanding_UH[batch.answers.rows_Y]
            answer = captioning_loss(self.model.lm_head, answers_YH, batch.answers.labels_Y).sum()

        plain = [flow, caption, regression, answer]
        weighted_caption = weighted_sum(caption_Y, batch.captions.weights_Y)
        weighted = [flow, weighted_caption, weighted_regression, answer]
        if "contrast" in self.losses:
            contrast = flow_contrast_loss(predicted_XC, velocity_XC, batch.latents).sum()
            plain.append(contrast)
            weighted.append(contrast)
        if "negative" in self.losses:
            margin, form = self.settings.negative_margin, self.settings.negative_form
            negative_B = negative_loss(entropy_Y, batch.negatives, margin, form)
            plain.append(negative_B.sum())
            weighted.append(weighted_sum(negative_B, batch.negatives.weights_B))
        sums, weighted_sums = torch.stack(plain), torch.stack(weighted)
        counts = counts.clamp(min=1).to(sums.dtype)
        weighted_losses = weighted_sums / counts
        total = (weighted_losses * self._weights_like(weighted_losses)).sum()
        return total, sums.detach() / counts

    def _weights_like(self, losses: torch.Tensor) -> torch.Tensor:
        """One for each loss, kept on the device: uploading a list in every micro-batch would wait
        for it."""
        if self._loss_weights is not None:
            (settings, scales), kept = self._loss_weights
            of_dtype_and_device = (kept.device, kept.dtype) == (losses.device, losses.dtype)
            if settings is self.settings and scales is self.scales and of_dtype_and_device:
                return kept
        given = self.settings.weights
        values = [given[name] * self.scales[name] for name in self.losses]
        weights = torch.tensor(values, dtype=losses.dtype, device=losses.device)
        self._loss_weights = (self.settings, self.scales), weights
        return weights

    def choose_trainable(self, train: str, lora: LoraSettings) -> None:
        """Which weights train, by `model.train`; lora adds the adapters."""
        match train:
            case "generation" | "all":
                self.set_trainable(everything=train == "all")
            case "lora":
                add_adapters(self.model, lora)
                for name, parameter in self.named_parameters():
                    parameter.requires_grad = lora.trains(name)
            case _:
                raise ValueError(f"Unknown model.train {train!r}.")

    def set_trainable(self, everything: bool) -> None:
        """`everything`: all weights train; otherwise the generation expert, latent interface,
        metaqueries and regression head."""
        for name, parameter in self.named_parameters():
            added_by_uno = not name.startswith("model.")
            parameter.requires_grad = everything or added_by_uno or is_generation(name)

    def latent_rows(self, batch: PackedBatch) -> torch.Tensor:
        """[G, C]: clean latents of all images of the batch, in the order of the generation slab."""
        # On a CPU a convolution's last bits depend on the number of threads, and prepared latents
        # may be encoded with another number.
        with one_thread():
            return latent_rows(batch, self.codec, self.model.shape)
