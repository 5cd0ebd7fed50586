"""The distances between a metaquery's prediction and its target.

To add one: a member here, its formula in reference.py (the specification), and its branch in every
kernel of tiles.py that switches on KIND; a kind without a branch fails to compile there.
"""

import enum


class RegressionKind(enum.IntEnum):
    COSINE = 0
    L2 = 1
    SMOOTH_L1 = 2

    @property
    def setting(self) -> str:
        """Its name in recipes."""
        return self.name.lower()


# Made once: torch.compile of torch 2.11 cannot iterate over an enumeration under Python 3.13.
_KINDS = {kind.setting: kind for kind in RegressionKind}


def kind_names() -> tuple[str, ...]:
    return tuple(_KINDS)


def kind_of(name: str) -> RegressionKind:
    """Raises ValueError for a name that no kind has."""
    if name not in _KINDS:
        allowed = ", ".join(kind_names())
        raise ValueError(f"Unknown regression loss '{name}'; allowed are {allowed}.")
    return _KINDS[name]
