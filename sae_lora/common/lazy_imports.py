"""Starts what needs torch sooner: `python -m sae_lora.common.lazy_imports MODULE …` does `MODULE.main`.

What torch, transformers and SAELens bring into memory stays there. Python would search it for garbage
again and again while it comes in, for nothing.
"""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """What is imported in this block is not searched for garbage, then or later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def main() -> int:
    """Does what the module of that name does as a program, with the arguments that follow it."""
    del sys.argv[0]
    with quick_imports():
        module = importlib.import_module(sys.argv[0])
    return module.main()


if __name__ == "__main__":
    sys.exit(main())
