"""The embedded default: a small trained language model with SAEs, so that everything runs offline.

`python -m scripts.embedded` made what lies in `artefacts/` and can make it again.
"""

from pathlib import Path

ARTEFACTS = Path(__file__).parent / "artefacts"
MODEL = ARTEFACTS / "model"
SAES = ARTEFACTS / "saes"
NAME = "tiny"
"""`model.name` of the embedded model."""
BLOCK = 3
"""The block of the SAE if a config names none. Its SAEs have the most widths."""
