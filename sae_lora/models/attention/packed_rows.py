"""The rows of a batch hold one sequence each: transformers' search for several is done once per shape.

In every forward pass, transformers asks the device whether positions begin anew inside a row, and the
host waits for the answer. A `LanguageModel` leaves the positions to the model, so that the answer
depends only on the shape of the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils

_SEARCH = "find_packed_sequence_indices"
"""The function of transformers, in `masking_utils`."""
Answers = dict[tuple[object, ...], Tensor | None]
"""The results of the search by shape and device of the positions."""


@contextmanager
def searched_once(answers: Answers) -> Iterator[None]:
    """Inside the `with` block, use the answers that are known, and add those that are not.

    Args:
        answers: The answers for one model.
    """
    search = getattr(masking_utils, _SEARCH, None)
    if search is None:  # another version of transformers; nothing but time depends on it
        yield
        return

    def answer(position_ids: Tensor) -> Tensor | None:
        key = position_ids.shape, position_ids.device
        if key not in answers:
            answers[key] = search(position_ids)
        return answers[key]

    setattr(masking_utils, _SEARCH, answer)
    try:
        yield
    finally:
        setattr(masking_utils, _SEARCH, search)
