"""Faster imports of large libraries: `python -m sae_lora.common.lazy_imports MODULE …` runs a module so.

The garbage collector is off during these imports. It would search the many new objects of torch or
transformers again and again and free none of them, which takes a third of the time of the import.
"""

import gc
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_LARGE = "torch transformers peft sae_lens datasets pandas plotly wandb lm_eval".split()


class _Finder(MetaPathFinder):
    """Import finder that executes modules of large libraries without garbage collection."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _LARGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                was_enabled = gc.isenabled()
                gc.disable()
                try:
                    execute(module)
                finally:
                    if was_enabled:
                        gc.freeze()
                        gc.enable()

            spec.loader.exec_module = exec_module
        return spec


def import_quickly() -> None:
    """From now on, import large libraries in this process without garbage collection."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def main() -> int:
    """Run `main` of the module named by the first argument, with the other arguments."""
    import_quickly()
    del sys.argv[0]
    return importlib.import_module(sys.argv[0]).main()


if __name__ == "__main__":
    sys.exit(main())
