"""Tasks for lm-evaluation-harness that ship with the package, so that benchmarks run offline.

Their rows are cut from held-out files of the Python standard library, which the embedded model was not
trained on, by `python -m scripts.cut_tasks`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
