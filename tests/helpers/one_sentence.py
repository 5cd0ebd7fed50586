"""Messages of errors."""


def one_sentence(error: ValueError, *words: str) -> None:
    text = str(error)
    assert text.endswith(".") and "\n" not in text and text[0].isalpha()
    for word in words:
        assert word in text, f"'{word}' is missing in: {text}"
