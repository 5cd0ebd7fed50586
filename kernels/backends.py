"""Which backend runs a kernel: resolved once at start-up, never switched silently."""
from dataclasses import dataclass

from uno_ds.settings import setting

ATTENTION_BACKENDS = ("reference", "sdpa")
REGRESSION_BACKENDS = ("reference",)


@dataclass(frozen=True)
class KernelSettings:
    attention: str = setting("auto", choices=("auto", *ATTENTION_BACKENDS),
                             doc="Backend of the segment-masked attention. reference: dense mask; sdpa: torch's "
                                 "scaled_dot_product_attention, one padded row per sample; auto: sdpa.")
    regression: str = setting("auto", choices=("auto", *REGRESSION_BACKENDS),
                              doc="Backend of the metaquery regression loss. auto: reference.")

    def resolved(self) -> "KernelSettings":
        """The same settings with every `auto` replaced by the backend that will run."""
        return KernelSettings(attention="sdpa" if self.attention == "auto" else self.attention,
                              regression="reference" if self.regression == "auto" else self.regression)
