"""The column names of public data sets, by what they hold."""

import re
from dataclasses import replace
from itertools import chain

from uno_ds.data.columns import Form, Meaning

# Of a text-to-image row, a conversation or a row of parts.
IMAGE = Meaning(
    names=("image", "images", "jpg", "png", "webp", "jpeg", "avif", "gif", "bmp", "tif", "tiff"),
    others=(
        *("img", "imgs", "picture", "photo", "pixels", "pixel_values", "image_bytes", "img_bytes"),
        *("image_data", "image_base64", "img_base64", "base64"),
    ),
    last=(
        *("file_name", "image_path", "img_path", "image_file", "image_name", "file_path"),
        *("filepath", "filename", "path"),
    ),
)
# Beside a conversation. Names of files that other data has too are none of an image there.
IMAGES_IF_ANY = replace(
    IMAGE, last=("file_name", "image_path", "img_path", "image_file"), required=False
)
CAPTION = Meaning(
    names=("caption", "text"),
    others=("prompt", "txt", "description", "sentence", "sentences", "sentences_raw", "alt_text"),
    texts=True,
)
# JSON of captions, as in the public BAGEL data.
CAPTIONS = Meaning(names=("captions",), texts=True)
_NOT_A_TEXT = (
    "count|embedding|embeddings|emb|hash|id|ids|lang|language|len|length|model|name|num|path|prob|"
    "probability|score|scores|source|status|time|tokens?|type|url|version|neg|negative"
)
# Further captions of the same image, mostly of other captioners.
RECAPTION = Meaning(
    pattern=re.compile(
        rf"(?!(?:n|num|has|is|neg|negative)_)(?!\w*_(?:{_NOT_A_TEXT})$)"
        r"(?:re_?captions?(?:_\w+)?|\w+_(?:re)?captions?|captions?_\w+)"
    ),
    texts=True,
)
NEGATIVE = Meaning(names=("negative_caption", "negative_captions"), texts=True, required=False)
TEXT_TO_IMAGE: tuple[Form, ...] = (
    {
        "image": IMAGE,
        "captions": CAPTIONS,
        "caption": Meaning(names=("caption", "text"), texts=True, required=False),
        "recaption": replace(RECAPTION, required=False),
        "negative": NEGATIVE,
    },
    {
        "image": IMAGE,
        "caption": CAPTION,
        "recaption": replace(RECAPTION, required=False),
        "negative": NEGATIVE,
    },
    {"image": IMAGE, "recaption": RECAPTION, "negative": NEGATIVE},
)

_SOURCES = (
    *("source_image", "src_img", "source_img", "src_image", "input_image", "input_img"),
    *("original_image", "before_image", "image_file"),
)
_TARGETS = (
    *("target_image", "target_img", "edited_image", "edited_img", "output_image", "output_img"),
    *("after_image", "result_image", "edited_file"),
)
_INSTRUCTIONS = (
    *("instruction", "instructions", "instruction_list", "edit_prompt", "edited_prompt_list"),
    *("edit_instruction", "edit_instructions", "editing_instruction", "edit", "edit_text"),
)
# The same instruction in other words.
_REWORDING = Meaning(
    pattern=re.compile(
        rf"(?!\w*_(?:{_NOT_A_TEXT})$)"
        r"(?:(?:summarized|short|long|rewritten|rewrited|complex|detailed|concise)_"
        r"(?:text|instruction|prompt|edit)|instructions?_\w+)"
    ),
    texts=True,
    required=False,
)
# Captions of the edited image; edited_prompt is one where edit_prompt is the instruction.
_TARGET_CAPTION = Meaning(
    names=("target_caption", "target_captions", "edited_caption", "output_caption"),
    last=("target_prompt", "edited_prompt", "output"),
    texts=True,
    required=False,
)
EDIT: tuple[Form, ...] = (
    {
        "image_list": Meaning(names=("image_list",)),
        "instruction_list": Meaning(names=("instruction_list",)),
        "caption_list": Meaning(names=("caption_list",), required=False),
    },
    {
        "source": Meaning(names=("local_input_image",), others=_SOURCES),
        "target": Meaning(others=_TARGETS),
        "instruction": Meaning(
            names=_INSTRUCTIONS, others=("text", "prompt", "input_prompt"), texts=True
        ),
        "rewording": _REWORDING,
        "caption": _TARGET_CAPTION,
    },
    # Short names, which other data has too, only beside a column that is named as an instruction.
    {
        "source": Meaning(
            names=(*_SOURCES, "source", "src", "input", "original", "before", "image")
        ),
        "target": Meaning(names=(*_TARGETS, "target", "output", "edited", "after")),
        "instruction": Meaning(names=_INSTRUCTIONS, texts=True),
        "rewording": _REWORDING,
        "caption": _TARGET_CAPTION,
    },
)

CONVERSATION: tuple[Form, ...] = (
    {
        "conversations": Meaning(
            names=("conversations",),
            others=("messages", "conversation", "dialog", "dialogue", "dialogs"),
        ),
        "image": IMAGES_IF_ANY,
    },
)

# Conversations are read as parts where a source asks for the layout.
INTERLEAVED: tuple[Form, ...] = ({"parts": Meaning(names=("parts",))}, *CONVERSATION)

# Names that members of one row of an archive have between its key and their suffix.
_MEANINGS_OF_EDITS = list(chain.from_iterable(form.values() for form in EDIT))
MEMBERS = frozenset(
    chain.from_iterable((*each.names, *each.others, *each.last) for each in _MEANINGS_OF_EDITS)
)
