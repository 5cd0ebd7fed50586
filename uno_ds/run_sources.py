"""Opens and checks what a run reads besides its base: tokenizer and data sources."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from uno_ds.data.examples import Example
from uno_ds.data.files import one_line
from uno_ds.data.images import BadRow
from uno_ds.data.layouts.text_to_image import TextToImage
from uno_ds.data.listing import find
from uno_ds.data.prepared import PreparedSource, is_prepared
from uno_ds.data.samples import SampleMaker
from uno_ds.data.source_checks import check_readable, check_usable
from uno_ds.data.sources import EMBEDDED, Source, SourceSettings
from uno_ds.data.streamed import StreamedSource
from uno_ds.data.text import Tokenizer
from uno_ds.objectives.preparation import encoding_of
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.sequence.composition import SampleComposer
from uno_ds.settings import SettingsError, printable
from uno_ds.training.launch_environment import is_first_here

# Of a source, in which there must be a negative caption where they are read from a column.
ROWS_WITH_NEGATIVES = 100


def open_tokenizer(recipe: Recipe, absent: list[str] | None = None) -> Tokenizer | None:
    """None where a dry run finds none; absent: as in `prepare`. Raises SettingsError."""
    folder = recipe.tokenizer_folder
    if absent is not None:
        is_there = list(folder.glob("*token*")) or (folder / "vocab.json").exists()
        if not is_there:
            if recipe.model.base != recipe.model.published_shape:
                absent.append(f"model.tokenizer: there is none in {folder}.")
            return None
    try:
        return Tokenizer(folder)
    except SettingsError as error:
        raise SettingsError("model.tokenizer", error.message) from None
    except OSError as error:
        raise SettingsError("model.tokenizer", one_line(error)) from None


def open_sources(
    recipe: Recipe, tokenizer: Tokenizer | None, absent: list[str] | None = None
) -> dict[int, Source]:
    """{number in the recipe: opened source}. Sources whose paths give the same name get a number
    after it. Raises SettingsError, also for a source that was prepared with other settings than the
    recipe's. absent: as in `prepare`."""
    sources: dict[int, Source] = {}
    names: Counter[str] = Counter()
    for number, settings in enumerate(recipe.data.sources):
        try:
            if absent is not None and settings.path not in EMBEDDED and not find(settings.path):
                absent.append(
                    f"data.sources.{number}.path: '{settings.path}' holds no data here, so none "
                    "was checked."
                )
                continue
            source = _open_source(recipe, settings, tokenizer)
        except SettingsError as error:
            raise error.under(f"data.sources.{number}") from None
        # An invalid path: too long, an unknown ~user, ".".
        except (OSError, RuntimeError, ValueError) as error:
            raise SettingsError(
                f"data.sources.{number}.path",
                f"'{settings.path}' cannot be opened: {one_line(error)}",
            ) from None
        names[source.name] += 1
        if names[source.name] > 1:
            source.name += f" ({names[source.name]})"
        sources[number] = source
    return sources


def open_held_out(
    recipe: Recipe, tokenizer: Tokenizer | None, absent: list[str] | None
) -> list[Source]:
    """The sources of evaluate.sources, whose names differ; none if the run does not evaluate.
    Raises SettingsError. absent: as in `prepare`."""
    sources: list[Source] = []
    for number, settings in enumerate(recipe.evaluate.sources if recipe.evaluate.every else []):
        where = f"evaluate.sources.{number}"
        try:
            if absent is not None and settings.path not in EMBEDDED and not find(settings.path):
                absent.append(f"{where}.path: '{settings.path}' holds no data here.")
                continue
            source = _open_source(recipe, settings, tokenizer)
        except SettingsError as error:
            raise error.under(where) from None
        except (OSError, RuntimeError, ValueError) as error:
            message = f"'{settings.path}' cannot be opened: {one_line(error)}"
            raise SettingsError(f"{where}.path", message) from None
        if source.name in [other.name for other in sources]:
            message = f"'{source.name}' is the name of two sources; names must differ."
            raise SettingsError(f"{where}.name", message)
        sources.append(source)
    return sources


def open_recipe_source(
    name_or_file: str, overrides: Sequence[str], settings: SourceSettings
) -> tuple[Recipe, Tokenizer, Source]:
    """One source outside of a run, by a recipe's sizes of images and tokenizer. Raises
    SettingsError."""
    recipe = load_recipe(name_or_file, list(overrides))
    tokenizer = open_tokenizer(recipe)
    assert tokenizer is not None, "only a dry run continues without a tokenizer"
    try:
        return recipe, tokenizer, _open_source(recipe, settings, tokenizer)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(
            "path", f"'{printable(settings.path)}' cannot be opened: {one_line(error)}."
        ) from None


def sample_maker(recipe: Recipe, composer: SampleComposer, tokenizer: Tokenizer) -> SampleMaker:
    data = recipe.data
    budget = recipe.sequence.token_budget
    return SampleMaker(composer, tokenizer, data.latent_image, data.vit_image, budget)


def check_sources(
    sources: dict[int, Source], make_sample: SampleMaker, warnings: list[str] | None
) -> None:
    """Raises SettingsError if a source has no usable row. Warnings go to the list, or are
    printed."""
    for number, source in sources.items():
        _check_rows(number, source, make_sample)
        warning = _left_out_texts(number, source)
        if warning and warnings is not None:
            warnings.append(warning)
        elif warning:
            warn(warning)


def check_negatives(sources: Iterable[Source]) -> None:
    """Raises SettingsError if no source has negative captions in its first rows."""
    names: list[str] = []
    for source in sources:
        names.append(f"'{source.name}'")
        for index in range(min(len(source), ROWS_WITH_NEGATIVES)):
            try:
                example = source.read(index, np.random.default_rng(0))
            except BadRow:
                continue
            if not isinstance(example, TextToImage):
                break
            if example.negatives:
                return
    raise SettingsError(
        "objective.negative_source",
        f"is column, but none of the sources {', '.join(names)} has a negative caption in its "
        f"first {ROWS_WITH_NEGATIVES} rows; name their column by `columns: {{negative: NAME}}` of "
        "the t2i source, prepare a prepared source again, or set negative_source to pack.",
    )


def warn(line: str) -> None:
    """Prints a warning, on the first rank of the machine."""
    if is_first_here():
        print(f"warning: {line}", flush=True)


def _open_source(recipe: Recipe, settings: SourceSettings, tokenizer: Tokenizer | None) -> Source:
    data = recipe.data
    if is_prepared(settings.path):
        prepared = PreparedSource(settings)
        if tokenizer is not None and not recipe.missing_files:
            prepared.check(encoding_of(recipe, tokenizer, prepared.layout))
        return prepared
    if settings.streaming:
        return StreamedSource(settings, decoding=data.latent_image)
    source = Source(settings, decoding=data.latent_image, embedded=data.scenes, root=data.folder)
    check_readable(source, data.max_unreadable_fraction)
    return source


def _check_rows(number: int, source: Source, make_sample: SampleMaker) -> None:
    """Raises SettingsError if no row of the source can be used."""

    def try_example(example: Example) -> None:
        make_sample(example, np.random.default_rng(0))

    def report(line: str) -> None:
        if is_first_here():
            print(line, file=sys.stderr, flush=True)

    try:
        check_usable(source, try_example, report)
    except SettingsError as error:
        raise error.under(f"data.sources.{number}") from None


def _left_out_texts(number: int, source: Source) -> str | None:
    """A warning about texts that are ignored as metadata, if there are any."""
    if not source.left_out_keys:
        return None
    keys = printable(", ".join(source.left_out_keys))
    return (
        f"data.sources.{number}.caption_keys: source '{source.name}' has texts under {keys}, which "
        "are not used, as they look like metadata; name the keys of captions there to choose."
    )
