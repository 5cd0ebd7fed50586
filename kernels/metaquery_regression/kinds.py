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


def kind_names() -> tuple[str, ...]:
    return tuple(kind.setting for kind in RegressionKind)


def kind_of(name: str) -> RegressionKind:
    """Raises ValueError for a name that no kind has."""
    if name not in kind_names():
        allowed = ", ".join(kind_names())
        raise ValueError(f"Unknown regression loss '{name}'; allowed are {allowed}.")
    return RegressionKind[name.upper()]
