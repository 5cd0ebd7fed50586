"""Public function of QK-norm with rotary embedding: checks its arguments and calls the backend."""

from collections.abc import Sequence

import torch

from uno_ds.kernels.backends import implementation


def qk_norm_rope(
    q: Sequence[torch.Tensor],
    k: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    q_weight: Sequence[torch.Tensor],
    k_weight: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    place: torch.Tensor | None = None,
    backend: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, N, D], k and v [T, K, D] of all T rows, from slabs of one expert's rows each. An
    argument has one tensor per slab: its rows of q [., N, D], of k and v [., K, D].

    Rows of q and k are divided by their root mean square over D (plus `eps` under the root),
    multiplied by the slab's q_weight or k_weight [D], and rotated by the angles of cos, sin [T, F]
    in the half-split convention; v is copied. Row i of the concatenated slabs becomes row place[i]
    (a permutation, int32 or int64 [T]; None: row i). cos, sin and place are constants. Raises
    ValueError for shapes and dtypes that do not fit, an unknown backend, and inputs that the
    backend cannot compute with."""
    module = implementation("norm_rope", backend)
    if not q or len({len(slabs) for slabs in (q, k, v, q_weight, k_weight)}) != 1:
        raise ValueError(
            f"q, k, v, q_weight and k_weight must have one entry per slab; got {len(q)}, {len(k)}, "
            f"{len(v)}, {len(q_weight)}, {len(k_weight)}."
        )
    for number, slab in enumerate(zip(q, k, v, q_weight, k_weight)):
        _check_slab(number, *slab, heads=(q[0].shape[1:], k[0].shape[1:]))
    rows = sum(map(len, q))
    half = q[0].shape[2] // 2
    if tuple(cos.shape) != (rows, half) or tuple(sin.shape) != (rows, half):
        raise ValueError(
            f"cos and sin must be [T, D/2] = [{rows}, {half}]; got {list(cos.shape)} and "
            f"{list(sin.shape)}."
        )
    if place is not None and (
        tuple(place.shape) != (rows,) or place.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"place must be [T] = [{rows}] of int32 or int64; got {list(place.shape)} of "
            f"{place.dtype}."
        )
    dtypes = {x.dtype for x in (*q, *k, *v, *q_weight, *k_weight)}
    if len(dtypes) > 1:
        raise ValueError(
            "q, k, v and their weights must have one dtype; got "
            f"{', '.join(sorted(map(str, dtypes)))}."
        )
    return module.qk_norm_rope(q, k, v, q_weight, k_weight, cos, sin, eps, place)


def _check_slab(
    number: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    heads: tuple[torch.Size, torch.Size],
) -> None:
    fits = (
        q.dim() == k.dim() == 3
        and v.shape == k.shape
        and len(q) == len(k)
        and (q.shape[1:], k.shape[1:]) == heads
        and q.shape[2] == k.shape[2]
        and q.shape[2] % 2 == 0
        and q_weight.shape == k_weight.shape == q.shape[2:]
    )
    if not fits:
        shapes = [list(x.shape) for x in (q, k, v, q_weight, k_weight)]
        raise ValueError(
            "q [T, N, D], k and v [T, K, D], q_weight and k_weight [D] with even D, with the same "
            f"N, K and D in all slabs, do not fit in slab {number}: got {shapes}."
        )
