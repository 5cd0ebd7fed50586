"""The layouts of data rows: one file each, and the registry through which all code finds them."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from uno_ds.data.examples import Example
from uno_ds.data.layouts.base import Layout
from uno_ds.data.layouts.conversation import ConversationLayout
from uno_ds.data.layouts.edit import EditLayout
from uno_ds.data.layouts.interleaved import InterleavedLayout
from uno_ds.data.layouts.text_to_image import TextToImageLayout

AUTO = "auto"
# By name. The columns of a row are compared from the last layout to the first: add those with more
# specific columns at the end.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (TextToImageLayout(), EditLayout(), ConversationLayout(), InterleavedLayout())
}


def get_layout(name: str) -> Layout:
    """Raises ValueError for a name that is not in the registry."""
    if name not in LAYOUTS:
        raise ValueError(f"Unknown layout {name!r}; allowed are {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def detect_layout(
    columns: Iterable[str], given: Mapping[str, tuple[str, ...]] = MappingProxyType({})
) -> Layout | None:
    """The layout of a row that has values in these columns; None if no layout matches. `given`: the
    columns that a source names, by meaning. Raises AmbiguousColumns."""
    names = list(columns)
    for layout in reversed(LAYOUTS.values()):
        if layout.recognises(names, given):
            return layout
    return None


def known_meanings() -> dict[str, list[str]]:
    """The meanings to which a source can map columns, and the layouts that have them."""
    meanings: dict[str, list[str]] = {}
    for layout in LAYOUTS.values():
        for form in layout.forms:
            for name in form:
                if layout.name not in meanings.setdefault(name, []):
                    meanings[name].append(layout.name)
    return meanings


def layout_of_example(example: Example) -> Layout:
    """Raises TypeError for an example that no layout makes."""
    for layout in LAYOUTS.values():
        if type(example) is layout.example:
            return layout
    raise TypeError(f"No layout makes examples of type {type(example).__name__}.")


def planned_layout(name: str) -> str:
    """The layout by which a source without data here is planned: the usual one for `auto`."""
    return TextToImageLayout.name if name == AUTO else get_layout(name).name
