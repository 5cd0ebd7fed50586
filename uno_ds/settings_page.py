"""The table of all recipe keys; `python -m uno_ds.settings_page --write-docs` puts it into
docs/settings.md."""

import sys
from pathlib import Path

from uno_ds.recipe import Recipe
from uno_ds.settings import describe


def settings_table() -> str:
    """Markdown table of every recipe key, from the settings classes."""
    lines = ["| key | type | default | what it does |", "|---|---|---|---|"]
    for row in describe(Recipe):
        key, kind, default, note = (cell.replace("|", "\\|") for cell in row)
        shown = default if default == "required" else f"`{default}`"
        lines.append(f"| `{key}` | {kind} | {shown} | {note} |")
    return "\n".join(lines) + "\n"


def with_settings_table(text: str) -> str:
    """docs/settings.md with a new table of recipe keys between its markers."""
    start = text.index("\n", text.index("<!-- settings")) + 1
    return text[:start] + "\n" + settings_table() + "\n" + text[text.index("<!-- /settings -->") :]


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs/settings.md"
    if "--write-docs" in sys.argv:
        page.write_text(with_settings_table(page.read_text()))
    else:
        print(settings_table())
