"""The machines that a run can be planned for: figures of the makers' data sheets, without
sparsity."""

from dataclasses import dataclass

from uno_ds.settings import setting


@dataclass(frozen=True)
class Gpu:
    """memory: advertised bytes (drivers report a few percent more). matmul: dense bf16 FLOP per
    second. link: bytes per second and direction to the other GPUs of a node. network: bytes per
    second to other nodes, of the network card that the makers' eight-GPU servers have for each GPU.
    watts: of the board at most."""

    memory: int
    matmul: float
    link: float
    network: float
    watts: int


# NVIDIA data sheets: A100 80GB SXM, H100 SXM, H200 SXM, B200 (HGX), L40S, GeForce RTX 4090 (sums in
# fp32). NVLink is advertised for both directions together.
GPUS = {
    "A100-80GB": Gpu(80 * 10**9, 312e12, 300e9, 25e9, 400),
    "H100-80GB": Gpu(80 * 10**9, 989e12, 450e9, 50e9, 700),
    "H200-141GB": Gpu(141 * 10**9, 989e12, 450e9, 50e9, 700),
    "B200-180GB": Gpu(180 * 10**9, 2250e12, 900e9, 50e9, 1000),
    "L40S-48GB": Gpu(48 * 10**9, 362e12, 32e9, 25e9, 350),
    "RTX4090-24GB": Gpu(24 * 10**9, 165e12, 32e9, 25e9, 450),
}


@dataclass(frozen=True)
class HardwareSettings:
    gpu: str | None = setting(
        None,
        choices=(*GPUS, None),
        doc="GPU that the run is planned for; --dry-run reports whether it fits, and accepts that "
        "the base or data are absent on this machine. null: this machine.",
    )
    gpus: int | None = setting(
        None,
        minimum=1,
        doc="Number of GPUs; --dry-run uses it where no --world-size is given.",
        maximum=10**6,
    )
    peak_flops: float | None = setting(
        None,
        above=0,
        doc="FLOP per second of one device, of which `mfu` in the metrics is a share; null: the "
        "data sheet's bf16 rate of a GPU that is in the table, else `mfu` is null. CPUs are not in "
        "the table.",
        maximum=1e18,
    )
    gpus_per_node: int = setting(
        8,
        minimum=1,
        doc="GPUs that share a node and its fast links.",
        maximum=10**6,
    )
