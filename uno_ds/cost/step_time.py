"""Time of an optimizer step and GPU hours of a run on N GPUs, modelled from a rate of computing and
rates of links.

    computing  = FLOP of a rank's packs, recomputation included / rate
    sending    = bytes of a rank / bandwidth of a ring. Within a node: that of its link. Across
                 nodes: the slower of the link and of all network cards of the node together,
                 gpus_per_node * network, since a ring leaves each node once and a collective has
                 a ring over each card
    step         between max(computing, sending), if all sending overlaps with computing, and
                 their sum, if none does

The optimizer's own time, data, stragglers and checkpoints are left out. Give a measured rate where
there is one; without it every time here is an assumption, and `assumptions` reports it."""

from dataclasses import dataclass

from uno_ds.cost.hardware import GPUS, Gpu
from uno_ds.cost.traffic import Traffic

SECONDS_PER_HOUR = 3600
# Share of a link's bandwidth that large collectives are assumed to reach, until it is measured.
REACHED = 0.8


@dataclass(frozen=True)
class StepTime:
    """Seconds. hidden: all sending overlaps with computing; exposed: none does."""

    gpus: int
    computing: float
    sending: float

    @property
    def hidden(self) -> float:
        return max(self.computing, self.sending)

    @property
    def exposed(self) -> float:
        return self.computing + self.sending

    def gpu_hours(self, steps: int) -> tuple[float, float]:
        """(all sending hidden, none hidden)."""
        hours = steps * self.gpus / SECONDS_PER_HOUR
        return self.hidden * hours, self.exposed * hours


def step_time(
    flop: float, sent: Traffic, gpu: Gpu, gpus: int, gpus_per_node: int, rate: float, reached: float
) -> StepTime:
    """`flop`: of one rank in a step. `rate`: FLOP per second that a GPU reaches in a step.
    `reached`: share of a link's data-sheet bandwidth that collectives reach."""
    inside = gpu.link
    across = inside if gpus <= gpus_per_node else min(gpu.link, gpus_per_node * gpu.network)
    bytes_across = sent.gather_weights + sent.reduce_gradients
    seconds_across = bytes_across / (across * reached)
    seconds_inside = sent.gather_within_node / (inside * reached)
    return StepTime(gpus, computing=flop / rate, sending=seconds_across + seconds_inside)


def assumptions(
    name: str,
    gpu: Gpu,
    gpus_per_node: int,
    rate: float,
    measured: bool,
    reached: float,
    links: str = "data sheets",
) -> list[str]:
    """Sentences that are printed with every number of this module. `links`: where their bandwidths
    are from."""
    source = "measured" if measured else "an assumption, not a measurement"
    sheet = ""
    if name in GPUS:
        sheet = f", {rate / gpu.matmul:.0%} of its data sheet's {gpu.matmul / 1e12:.0f}"
    return [
        f"a {name} does {rate / 1e12:.3g} TFLOP/s in a step{sheet} ({source})",
        f"links: {gpu.link / 1e9:.3g} GB/s per GPU and direction within a node of {gpus_per_node}, "
        f"{gpu.network / 1e9:.3g} GB/s per GPU to other nodes "
        f"({links}), of which collectives reach {reached:.0%} (an assumption)",
        "the optimizer's own time, data, stragglers, checkpoints and latencies of collectives, "
        "which grow with the number of ranks, are left out; the range is from all sending "
        "overlapped with computing to none",
    ]
