"""From an example of a source to a sample of segments within the token budget."""

import numpy as np

from uno_ds.data.example_encoder import ExampleEncoder
from uno_ds.data.examples import Example
from uno_ds.data.images import BadRow, ImageSettings
from uno_ds.data.layouts import layout_of_example
from uno_ds.data.text import Tokenizer
from uno_ds.sequence.composition import SampleComposer
from uno_ds.sequence.segments import Sample


class SampleMaker:
    """`latent_image`, `vit_image`: how images are sized for the codec and the visual encoder."""

    def __init__(
        self,
        composer: SampleComposer,
        tokenizer: Tokenizer,
        latent_image: ImageSettings,
        vit_image: ImageSettings,
        token_budget: int,
    ):
        self.encoder = ExampleEncoder(composer, tokenizer, latent_image, vit_image)
        self.token_budget = token_budget

    def unsupervised(self) -> "SampleMaker":
        """Makes the samples of plain flow matching from the same examples."""
        encoder = self.encoder
        return SampleMaker(
            encoder.composer.unsupervised(),
            encoder.tokenizer,
            encoder.latent_image,
            encoder.vit_image,
            self.token_budget,
        )

    def __call__(self, example: Example, rng: np.random.Generator) -> Sample:
        """Raises BadRow if the example has no usable text or does not fit the token budget."""
        sample = layout_of_example(example).sample(example, self.encoder, rng)
        if sample.length > self.token_budget:
            raise BadRow(
                "too_long_for_budget", f"{sample.length} tokens, the budget is {self.token_budget}"
            )
        return sample
