"""One micro-batch of one rank as tensors, grouped by the module that reads them.

Rows of a batch are tokens in SLAB order: [context: understanding, no gradient | understanding,
live | generation, live]. Index columns are int64.

Shape suffixes: docs/notation.md.
"""

from dataclasses import dataclass

import torch

from uno_ds.kernels.plan import AttentionPlan
from uno_ds.kernels.transfer import map_tensors, pinned, with_index


@dataclass(frozen=True, eq=False)
class VisionRows:
    """Patches of the visual encoder: condition images first, then the images of regression targets.

    patches_PC      float32, each patch flattened as (row, column, channel)
    positions_P     place of each patch in the encoder's position table
    plan            attention within each image
    lengths         patches of each image
    context_rows    how many of the P rows are tokens of the sequence
    context_images  how many of the images are condition images
    """

    patches_PC: torch.Tensor
    positions_P: torch.Tensor
    plan: AttentionPlan
    lengths: tuple[int, ...]
    context_rows: int
    context_images: int


@dataclass(frozen=True, eq=False)
class LatentRows:
    """Images of the codec, and the rows of the generation slab.

    images       grouped by size: pixels [n, 3, h, w], or latents [n, c, h, w] where `encoded` is
                 true
    encoded      for each group, whether it holds latents
    source_G     row of the grouped latents that each generation row starts from
    positions_G  place in the latent position table
    timestep_G   noise level t of each row; 0 is clean
    noise_XC     noise of the noised rows
    noised_X     the generation rows that are noised
    partner_X    for each noised row the noised row, counted among them, whose velocity it is
                 contrasted with; [0] without contrast or in a pack with one image
    """

    images: tuple[torch.Tensor, ...]
    encoded: tuple[bool, ...]
    source_G: torch.Tensor
    positions_G: torch.Tensor
    timestep_G: torch.Tensor
    noise_XC: torch.Tensor
    noised_X: torch.Tensor
    partner_X: torch.Tensor


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """rows_Y: understanding rows whose next token is predicted; labels_Y: ids of these tokens;
    weights_Y: float32, factors of their losses, None where all of them are 1."""

    rows_Y: torch.Tensor
    labels_Y: torch.Tensor
    weights_Y: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class NegativeCaptions:
    """Captions that an image must make less likely than its own.

    labels      rows and ids of their tokens
    tokens_BT   for each negative: the tokens of its image's caption, then its own, counted in
                [captions; negatives]; padded
    shares_BT   float64: -1 / the caption's tokens, then 1 / its own, so that the products' sum is
                the difference of mean cross entropies; 0 where padded
    weights_B   float32, factors of their losses, None where all of them are 1
    """

    labels: LabelledRows
    tokens_BT: torch.Tensor
    shares_BT: torch.Tensor
    weights_B: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class MetaqueryRows:
    """index_M: which query of the grids; positions_M: place of its cell's middle in the visual
    encoder's position table; rows_M: its understanding row; weights_M: as LabelledRows.weights_Y.
    """

    index_M: torch.Tensor
    positions_M: torch.Tensor
    rows_M: torch.Tensor
    weights_M: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class RegressionTargets:
    """Where the target of each metaquery comes from.

    patches_RP, weights_RP  patches whose weighted mean is a target; padded with weight 0
    prepared_EW             float32, targets that were computed before training or by program
    source_M                row of [R; E] that is each metaquery's target
    images, grids           pixels [3, h, w] in [-1, 1] of the target images, and their patches
                            (rows, columns), for an encoder that is no part of the model
    """

    patches_RP: torch.Tensor
    weights_RP: torch.Tensor
    prepared_EW: torch.Tensor
    source_M: torch.Tensor
    images: tuple[torch.Tensor, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of one rank.

    keys                     of the samples
    context, understanding, generation   rows of the three slabs
    order_T                  sequence position of each slab row
    rope_T                   RoPE id of each slab row
    context_plan, live_plan  attention plans of the queries of the context slab and of the live
                             slabs
    text_ids                 ids of all text and image-boundary tokens
    understanding_source_U   row of [text; vision context; metaqueries] that each row starts from
    """

    keys: tuple[str, ...]
    context: int
    understanding: int
    generation: int
    order_T: torch.Tensor
    rope_T: torch.Tensor
    context_plan: AttentionPlan
    live_plan: AttentionPlan
    text_ids: torch.Tensor
    understanding_source_U: torch.Tensor
    vision: VisionRows
    latents: LatentRows
    captions: LabelledRows
    negatives: NegativeCaptions
    answers: LabelledRows
    metaqueries: MetaqueryRows
    targets: RegressionTargets

    @property
    def tokens(self) -> int:
        return len(self.order_T)

    @property
    def loss_counts(self) -> dict[str, int]:
        """Tokens with each loss in this batch. Of the flow contrast all that have the flow loss, of
        which it is a share: divided by those with a partner alone, it would outgrow the flow loss
        where they are few, and the total would have no minimum."""
        return {
            "flow": len(self.latents.noised_X),
            "caption": len(self.captions.rows_Y),
            "regression": len(self.metaqueries.rows_M),
            "answer": len(self.answers.rows_Y),
            "contrast": len(self.latents.noised_X),
            "negative": len(self.negatives.tokens_BT),
        }

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PackedBatch":
        """A copy on `device`; floating-point tensors in `dtype` if one is given."""
        place = with_index(device)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            wanted = dtype if tensor.is_floating_point() else None
            return tensor.to(place, dtype=wanted, non_blocking=True)

        copy: PackedBatch = map_tensors(self, moved)
        return copy

    def pinned(self) -> "PackedBatch":
        """A copy in page-locked host memory, from which `to` a GPU is asynchronous."""
        copy: PackedBatch = map_tensors(self, pinned)
        return copy
