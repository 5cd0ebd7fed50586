"""What the loader's thread does with a batch before a step gets it: it derives from the attention
plans what the backend reads, and puts everything into page-locked memory, so that the step uploads
it without waiting."""

from contextlib import nullcontext

import torch

from uno_ds.kernels.backends import prepare_plan
from uno_ds.sequence.batch import PackedBatch


class BatchPreparation:
    """`attention`: the resolved backend. `vision_plan`: whether the visual encoder's plan is
    read; a frozen encoder on a CPU computes image by image and does not."""

    def __init__(self, attention: str, device: torch.device, vision_plan: bool):
        self.attention = attention
        self.device = device
        self.vision_plan = vision_plan

    def __call__(self, batch: PackedBatch) -> PackedBatch:
        """The batch in host memory, its plans with what the backend derives from them. For the
        loader's thread; raises ValueError for a plan that the backend cannot compute."""
        plans = [batch.context_plan, batch.live_plan]
        if self.vision_plan:
            plans.append(batch.vision.plan)
        on_gpu = self.device.type == "cuda"
        for plan in plans:
            prepare_plan(self.attention, plan, on_gpu)
        # Pinning needs the device's context, and a new thread starts on device 0.
        with torch.cuda.device(self.device) if on_gpu else nullcontext():
            return batch.pinned() if on_gpu else batch
