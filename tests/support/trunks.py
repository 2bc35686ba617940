"""A check of `Trunk`: shared computation for several rows of SAEs equals each row spliced in alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Reading, spliced
from sae_lora.splice.trunk import Splices, Trunk, prefixes


def check_trunk(model: LanguageModel, tokens: Tensor, rows: Sequence[Splices], cuts: set[int]) -> None:
    """Assert that hidden states and readings of a trunk equal those of splicing, to the last bit.

    Args:
        model: The plain model.
        tokens: `[batch, pos]`.
        rows: Sequences of SAEs that are spliced in together. Rows with a common prefix share readings.
        cuts: The blocks before which the trunk keeps the hidden states that rows share.
    """
    readings: dict[Splices, list[Reading]] = {}
    trunk = Trunk(model, tokens, cuts, lambda row, reading: readings.setdefault(row, []).append(reading))
    for row in rows:
        spliced_readings: list[Reading] = []
        with torch.no_grad(), spliced(model, row, tokens, spliced_readings.append):
            expected = model.hidden(tokens)
        assert torch.equal(trunk.hidden(row), expected)
        assert trunk.hidden(row) is trunk.hidden(row)
        assert len(spliced_readings) == len(row)
        by_hookpoint = {reading.hookpoint: reading for reading in spliced_readings}
        for prefix in prefixes(row):
            (first,) = readings[prefix]  # once, for any number of rows with this prefix
            reading = by_hookpoint[prefix[-1].hookpoint]
            assert first.hookpoint == reading.hookpoint
            for value, expected_value in zip(first[1:], reading[1:], strict=True):
                assert torch.equal(value, expected_value)
