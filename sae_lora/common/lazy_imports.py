"""Large libraries are imported sooner: `python -m sae_lora.common.lazy_imports MODULE …` runs one so.

What torch, transformers and the like bring into memory stays there. Python would search it for garbage
again and again while it comes in, for nothing: a third of the time that such an import takes.
"""

import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_LARGE = {
    "torch",
    "transformers",
    "peft",
    "sae_lens",
    "datasets",
    "pandas",
    "plotly",
    "wandb",
    "lm_eval",
}


@contextmanager
def _no_search() -> Iterator[None]:
    """Exclude the objects that this block imports from garbage collection, now and later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.enable()


class _Finder(MetaPathFinder):
    """Finds modules of large libraries as Python does, and has them executed without a search."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _LARGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with _no_search():
                    execute(module)

            spec.loader.exec_module = exec_module
        return spec


def import_quickly() -> None:
    """From now on, this process imports large libraries without searching them for garbage."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def main() -> int:
    """Does what the module of that name does as a program, with the arguments that follow it."""
    import_quickly()
    del sys.argv[0]
    return importlib.import_module(sys.argv[0]).main()


if __name__ == "__main__":
    sys.exit(main())
