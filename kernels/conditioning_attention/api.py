"""Public function of segment-masked attention: checks its arguments and calls the backend."""

import torch

from uno_ds.kernels.backends import implementation
from uno_ds.kernels.plan import AttentionPlan


def conditioning_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, backend: str = "sdpa"
) -> torch.Tensor:
    """Attention of q [T_q, H_q, D] over k, v [T_k, H_kv, D] as `plan` allows; returns [T_q, H_q,
    D].

    Query head h reads key head h // (H_q / H_kv). Rows that see nothing give 0 and gradient 0. The
    gradient is 0 for queries and keys that need none by the plan. Raises ValueError for shapes,
    dtypes or a plan that do not fit each other, for an unknown backend, and for inputs that the
    backend cannot compute."""
    module = implementation("attention", backend)
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q must be [T_q, H_q, D] and k, v [T_k, H_kv, D]; got {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)}."
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"The {q.shape[1]} query heads are not a multiple of the {k.shape[1]} key heads."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}.")
    if (len(q), len(k)) != (plan.queries, plan.keys):
        raise ValueError(
            f"The plan is for {plan.queries} queries and {plan.keys} keys, but got {len(q)} and "
            f"{len(k)} rows: it belongs to another batch."
        )
    return module.conditioning_attention(q, k, v, plan)
