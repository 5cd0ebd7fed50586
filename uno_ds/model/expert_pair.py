"""Both experts' share of a decoder layer with their projections computed together: the same as
Expert's methods, on the live rows of both.

Shape suffixes: docs/notation.md."""

import torch

from uno_ds.kernels.pointwise import swiglu
from uno_ds.model.experts import Expert


def project_both(
    und: Expert, gen: Expert, live_LH: torch.Tensor, understanding: int
) -> list[tuple[torch.Tensor, ...]]:
    """What `Expert.project` returns, for each expert. `understanding`: rows of the first."""
    rows = slice(understanding), slice(understanding, None)
    normed_LH = _normed(und.input_norm, gen.input_norm, live_LH, understanding)

    def product(name: str) -> torch.Tensor:
        values = _product(und, gen, name, normed_LH, understanding)
        return values.unflatten(-1, (-1, und.dim))

    k, v, q = product("k_proj"), product("v_proj"), product("q_proj")
    return [
        (q[own], k[own], v[own], expert.q_norm(), expert.k_norm())
        for own, expert in zip(rows, (und, gen), strict=True)
    ]


def finish_both(
    und: Expert,
    gen: Expert,
    live_LH: torch.Tensor,
    attended_LND: torch.Tensor,
    understanding: int,
) -> torch.Tensor:
    """Residual stream [L, H] of the live rows after output projection and MLP."""
    live_LH = live_LH + _product(und, gen, "o_proj", attended_LND.flatten(1), understanding)
    normed_LH = _normed(und.post_norm, gen.post_norm, live_LH, understanding)
    gate = _product(und, gen, "gate_proj", normed_LH, understanding)
    up = _product(und, gen, "up_proj", normed_LH, understanding)
    gated = swiglu(gate, up, und.pointwise)
    return live_LH + _product(und, gen, "down_proj", gated, understanding)


def _product(
    und: Expert, gen: Expert, name: str, rows_Li: torch.Tensor, understanding: int
) -> torch.Tensor:
    first, second = und.get_submodule(name), gen.get_submodule(name)
    out: torch.Tensor = first(rows_Li, understanding, second)
    return out


def _normed(
    und_norm: torch.nn.Module,
    gen_norm: torch.nn.Module,
    live_LH: torch.Tensor,
    understanding: int,
) -> torch.Tensor:
    return torch.cat([und_norm(live_LH[:understanding]), gen_norm(live_LH[understanding:])])
