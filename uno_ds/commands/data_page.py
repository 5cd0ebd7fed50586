"""What a source holds as one HTML page without other files: counts, histograms, samples with their
pictures, texts and visibility."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from uno_ds.data.sources import Source
from uno_ds.data.survey import ShownSample, Survey, histogram

LONGER_SIDE = 220  # pixels of a picture on the page
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; margin: 2em auto; max-width: 1100px;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: .2em .7em; text-align: left;
       border-bottom: 1px solid #ddd; vertical-align: top; } td.n { text-align: right; }
.bar { background: #3b6ea5; height: .8em; display: inline-block; }
.samples { display: grid; gap: 1.2em;
       grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); }
.sample { border: 1px solid #ccc; padding: .8em; }
.sample img { max-width: 100%; margin: 0 .4em .4em 0; }
.trained { background: #e8f1dc; } .mask td { width: 1.5em; height: 1.5em; padding: 0;
       border: 1px solid #fff; } .mask .all { background: #3b6ea5; } .mask .causal
       { background: linear-gradient(to top right, #3b6ea5 50%, #e4e4e4 50%); }
.mask .no { background: #e4e4e4; } .mask th { border: 0; font-weight: normal; font-size: .85em; }
"""


def page(source: Source, found: Survey, recipe: str) -> str:
    """The page of a source. `recipe`: name of the recipe by which samples were made."""
    parts = [
        f"<h1>{_escaped(source.name)}</h1>",
        f"<p>{_escaped(source.settings.path)} {_escaped(source.reading.line())}.</p>",
        f"<p>{found.tried:,} of {found.rows:,} rows were tried, {found.usable:,} can be used. "
        f"Lengths are those of the recipe {_escaped(recipe)}, whose token budget is "
        f"{found.token_budget:,}.</p>",
    ]
    if found.causes:
        rows = [
            [f"{count:,}", cause, str(found.first_of_cause[cause])]
            for cause, count in found.causes.most_common()
        ]
        parts += ["<h2>Unusable rows</h2>", _table(["rows", "cause", "the first"], rows)]
    kinds = [[f"{tokens:,}", kind] for kind, tokens in found.tokens.most_common()]
    parts += ["<h2>Tokens by kind of segment</h2>", _table(["tokens", "kind"], kinds)]
    parts += ["<h2>Tokens of a sample</h2>", _bars(found.lengths)]
    parts += ["<h2>Width of the images</h2>", _bars([size[0] for size in found.sizes])]
    parts += ["<h2>Height of the images</h2>", _bars([size[1] for size in found.sizes])]
    parts += ["<h2>Share of the token budget that packs fill, in %</h2>"]
    parts += [_bars([100 * share for share in found.fill])]
    parts += ["<h2>Samples</h2>", "<p>Green: segments with a loss.</p>", '<div class="samples">']
    parts += [_sample(sample) for sample in found.shown]
    parts.append("</div>")
    if found.shown:
        longest = max(found.shown, key=lambda sample: len(sample.segments))
        parts += [f"<h2>Attention between segments of row {longest.row}</h2>", _mask(longest)]
    title = _escaped(source.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _sample(sample: ShownSample) -> str:
    pictures = "".join(map(_picture, sample.pictures))
    rows = "".join(
        f"<tr{' class=trained' if segment.is_trained else ''}><td>{segment.kind}</td>"
        f'<td class="n">{segment.tokens:,}</td><td>'
        + _escaped(
            segment.text
            if segment.text is not None
            else f"{segment.grid[0]} x {segment.grid[1]} patches"
        )
        + "</td></tr>"
        for segment in sample.segments
    )
    title = f"Row {sample.row}, {sample.tokens:,} tokens"
    return f'<div class="sample"><b>{title}</b><br>{pictures}<table>{rows}</table></div>'


def _picture(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((LONGER_SIDE, LONGER_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = picture.size
    size = f"{width} x {height} pixels"
    return f'<img src="data:image/jpeg;base64,{data}" alt="{size}" title="{size}">'


def _mask(sample: ShownSample) -> str:
    """Rows see columns."""
    names = [f"{place} {segment.kind}" for place, segment in enumerate(sample.segments)]
    head = "".join(f"<th>{place}</th>" for place in range(len(names)))
    rows = ""
    for name, sees in zip(names, sample.sees, strict=True):
        cells = "".join(f"<td class={how} title={how}></td>" for how in sees)
        rows += f"<tr><th>{name}</th>{cells}</tr>"
    note = "A row sees a column: blue, all of it; half, up to its own place; grey, not."
    return f'<p>{note}</p><table class="mask"><tr><th></th>{head}</tr>{rows}</table>'


def _bars(values: Sequence[float]) -> str:
    counted = histogram(values)
    most = max((count for _, _, count in counted), default=1)
    rows = "".join(
        f'<tr><td class="n">{low:,.0f} to {high:,.0f}</td><td class="n">{count:,}</td>'
        f'<td><span class="bar" style="width:{300 * count // most}px"></span></td></tr>'
        for low, high, count in counted
    )
    return f"<table>{rows}</table>" if rows else "<p>None.</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_escaped(name)}</th>" for name in head)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{_escaped(cell)}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return f"<table><tr>{top}</tr>{body}</table>"


def _escaped(text: str) -> str:
    return html.escape(text)
