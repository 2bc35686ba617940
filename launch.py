"""Train a run, or a sweep: the same as `sae-lora launch`, in a clone of the repository.

python launch.py                          the default run, offline
python launch.py -m lora.rank=1,4,16,64   a sweep
python launch.py --help                   the config groups and every key
"""

import sys

from sae_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]]))
