"""What the understanding expert reads from noised latents: the cross entropy of the caption, the
caption that it would write, and what it predicts at metaqueries.

Captions and metaqueries from noised latents: UNO, arXiv:2605.05781. Shape suffixes:
docs/notation.md."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from uno_ds.data.scene_reading import score_text
from uno_ds.generation.inference import CaptionSettings, decode_texts
from uno_ds.inspection.images import caption_ids
from uno_ds.inspection.subject import Subject
from uno_ds.sequence.segments import SUPERVISION_KINDS, Kind, Sample

FACETS = ("count", "colours", "shapes", "relation", "all")


class HeadOutputs:
    """While entered, keeps what the language head and the regression head of an objective compute
    in a forward pass: `caption_Y`, the cross entropy of every caption row, and `cosine_M`, the
    cosine of prediction and target at every metaquery (None without metaqueries)."""

    def __init__(self, subject: Subject):
        self._objective = subject.objective
        self.caption_Y: torch.Tensor | None = None
        self.cosine_M: torch.Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> "HeadOutputs":
        head = self._objective.model.lm_head
        self._handles.append(head.register_forward_hook(self._keep_caption))
        if self._objective.regression is not None:
            regression = self._objective.regression
            self._handles.append(regression.register_forward_hook(self._keep_cosines))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def entropies(self, samples: Sequence[Sample]) -> list[tuple[float, int]]:
        """(sum of the cross entropies in nats, tokens) of the caption of each sample of the
        forward pass."""
        assert self.caption_Y is not None, "no forward pass yet"
        lengths = [len(caption_ids(sample) or [0]) - 1 for sample in samples]
        return [(float(piece.sum()), len(piece)) for piece in self.caption_Y.split(lengths)]

    def _keep_caption(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        # Answers come after captions.
        if self.caption_Y is None:
            self.caption_Y = output.detach().float().cpu()

    def _keep_cosines(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        hidden_MH, target_MW = arguments
        predicted_MW = hidden_MH.detach()
        assert self._objective.regression is not None, "its hook runs"
        weight = self._objective.regression.weight
        if weight is not None:
            predicted_MW = F.linear(predicted_MW, weight)
        self.cosine_M = F.cosine_similarity(predicted_MW.float(), target_MW.float()).cpu()


def by_sample(values_M: torch.Tensor, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """The values of each sample's metaqueries."""
    lengths = []
    for sample in samples:
        metaqueries = [each for each in sample.segments if each.kind == Kind.METAQUERY]
        lengths.append(sum(segment.length for segment in metaqueries))
    return list(values_M.split(lengths))


def read_captions(subject: Subject, samples: Sequence[Sample], most_tokens: int) -> list[str]:
    """The likeliest caption, token by token, that the understanding expert reads from each sample's
    noised latents; it does not see the prompt, as in training."""
    bare = []
    for sample in samples:
        kept = [each for each in sample.segments if each.kind not in SUPERVISION_KINDS]
        bare.append(Sample(sample.key, kept))
    objective = subject.objective
    texts = decode_texts(
        objective.model,
        objective.codec,
        subject.tokenizer,
        bare,
        CaptionSettings(max_tokens=most_tokens),
    )
    return [subject.tokenizer.decode(ids) for ids in texts]


def right_shares(texts: Sequence[str], scenes: Sequence[Any]) -> dict[str, float] | None:
    """The share of texts that say each facet of their scene rightly, by program (FACETS); None
    where no image has a scene."""
    judged = [
        score_text(text, scene)
        for text, scene in zip(texts, scenes, strict=True)
        if scene is not None
    ]
    if not judged:
        return None
    right: Counter[str] = Counter()
    for score in judged:
        right.update(facet for facet, holds in score.items() if holds)
    return {facet: right[facet] / len(judged) for facet in FACETS}
