"""Any recipe is prepared or refused, whatever was changed in it."""

import copy
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from uno_ds.recipe import merge, read_tree
from uno_ds.run import prepare
from uno_ds.settings import SettingsError


def slots(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    pairs = (
        list(node.items())
        if isinstance(node, dict)
        else list(enumerate(node))
        if isinstance(node, list)
        else []
    )
    return [slot for key, value in pairs for slot in [(node, key), *slots(value)]]


# Without the separators and ~ that would lead out of the test's folder. Big numbers are not given
# to `rows`: they would be drawn.
any_words = st.text("ab.*é\n{ %0", max_size=6)
whole = st.sampled_from([-1, 0, 1, 2, 3, 7, 31, 64, 600])
names = st.sampled_from(
    [
        "1e-4",
        "nan",
        "zero0",
        "zero2",
        "all",
        "scenes/edit",
        "photos/vlm",
        "base",
        "tiny_base",
        "flux",
        "random",
    ]
)
values = st.one_of(
    st.none(),
    st.booleans(),
    whole,
    st.sampled_from([10**30, 10**400, -0.5, 0.0, 0.5, 1.0, 1e300]),
    names,
    any_words,
    st.lists(whole, max_size=3),
    st.lists(any_words, max_size=2),
    st.dictionaries(any_words, whole, max_size=2),
)


# A failing recipe is small as it is; shrinking it further would take minutes.
@hypothesis_settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(st.data())
def test_any_recipe_is_prepared_or_refused_with_a_key(place, data):
    """One to three changes, additions or deletions anywhere in the recipes that ship."""
    recipe = data.draw(st.sampled_from(["tiny", "tiny_base"]))
    shared = {"output": "runs", "data": {"folder": "drawn", "scenes": {"rows": 24}}}
    given_base = {"model": {"base": "base"}} if recipe == "tiny" else {}
    mutated = copy.deepcopy(merge(merge(read_tree(recipe), shared), given_base))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(slots(mutated)), label="where")
        action = data.draw(
            st.sampled_from(["change", "change", "change", "delete", "add"]), label="how"
        )
        value = data.draw(whole if key in ("rows", "max_side") else values, label="what")
        if action == "delete":
            del container[key]
        elif action == "add" and isinstance(container, dict):
            container[data.draw(any_words | st.integers(), label="new key")] = value
        else:
            container[key] = value
        if not mutated:
            break
    path = place.folder / "mutated.yaml"
    path.write_text(yaml.safe_dump(mutated, allow_unicode=True), encoding="utf-8")
    try:
        prepare(str(path))
    except SettingsError as error:
        assert error.key and len(str(error).splitlines()) == 1
