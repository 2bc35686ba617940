"""What a trunk computes once for several rows of SAEs, held against each row spliced in alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Reading, spliced
from sae_lora.splice.trunk import Splices, Trunk, prefixes


def check_trunk(model: LanguageModel, tokens: Tensor, rows: Sequence[Splices], cuts: set[int]) -> None:
    """Asserts that hidden states and readings of a trunk are, to the last bit, those of splicing.

    Args:
        model: The plain model.
        tokens: `[batch, pos]`.
        rows: What is spliced in together. Rows that begin alike share a reading.
        cuts: The blocks before which the trunk keeps what rows share.
    """
    special = torch.tensor([3, 5])
    readings: dict[Splices, list[Reading]] = {}
    trunk = Trunk(
        model, tokens, special, cuts, lambda row, reading: readings.setdefault(row, []).append(reading)
    )
    for row in rows:
        keep = torch.isin(tokens, special) if row and row[0].keeps else None
        spliced_readings: list[Reading] = []
        saes = {splice.hookpoint: splice.sae for splice in row}
        with torch.no_grad(), spliced(model, saes, keep, spliced_readings.append):
            expected = model.hidden(tokens)
        assert torch.equal(trunk.hidden(row), expected)
        assert trunk.hidden(row) is trunk.hidden(row)
        assert len(spliced_readings) == len(row)
        by_hookpoint = {reading.hookpoint: reading for reading in spliced_readings}
        for whole in prefixes(row):
            (first,) = readings[whole]  # once, however many rows begin so
            reading = by_hookpoint[whole[-1].hookpoint]
            assert first.hookpoint == reading.hookpoint
            for value, expected_value in zip(first[1:], reading[1:], strict=True):
                assert torch.equal(value, expected_value)
