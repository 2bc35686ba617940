"""Tokens as text to be read one by one."""

from collections.abc import Iterable
from typing import Any


def texts_of(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each token, with the space before it.

    Tokenizers of one family leave this space out at the beginning of a text, so that each token is
    decoded behind another one. A token that is only a part of a character is shown as the tokenizer
    writes it.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[:1]
    start = len(_decoded(tokenizer, anchor))
    texts = []
    for id in ids:
        text = _decoded(tokenizer, [*anchor, id])[start:]
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            text = str(tokenizer.convert_ids_to_tokens(id) or f"<{id}>")
        texts.append(text)
    return texts


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
