"""Read exported latents with SAEDashboard's own classes, and compare what they write.

    pip install sae-dashboard==0.8.0
    python -m scripts.check_dashboards my_latents

In an environment of its own: SAEDashboard needs an older transformers than this package.
"""

import argparse
import importlib
import json
from pathlib import Path


def check(folder: Path) -> int:
    """Read every file of the folder; return the number of latents."""
    dashboards = importlib.import_module("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    files = sorted(folder.glob("*/*/batch-*.json"))
    if not files:
        raise SystemExit(f"{folder} has no files of `sae-lora export --latents`")
    latents = 0
    for file in files:
        values = json.loads(file.read_text())
        batch = dashboards.NeuronpediaDashboardBatch(**values)
        if batch.to_dict() != values:
            raise SystemExit(f"{file}: SAEDashboard reads other values than were written")
        latents += len(batch.features)
    return latents


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(f"{check(parser.parse_args().folder)} latents read")
