"""Keeps tables of docstrings in shape on the site: paragraphs whose lines are aligned by blanks
become code blocks."""

import re

import griffe

ALIGNED = re.compile(r"\S {2,}\S")


class AlignedTables(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(_as_code_if_aligned, paragraphs))


def _as_code_if_aligned(paragraph: str) -> str:
    lines = paragraph.split("\n")
    aligned = sum(bool(ALIGNED.search(line)) for line in lines)
    if aligned < 2 or paragraph.startswith("    "):
        return paragraph
    return "\n".join(f"    {line}" for line in lines)
