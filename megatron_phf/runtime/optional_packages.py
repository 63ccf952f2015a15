"""Optional packages of GPU machines: whether they import, and why not.

That one is found says little.  Transformer Engine's meta package alone is one whose import raises
RuntimeError, an extension may be built for another torch, and ``apex`` on PyPI is
another project; megatron-core takes any of them for what it needs and fails.  So each is imported
once, and one that does not import is hidden: from then on nobody in this process finds it.

Without torch, as long as none of them is there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from textwrap import shorten

# What of each is used, by us or by megatron-core.
_MODULES = {
    "transformer_engine": ("transformer_engine.pytorch",),
    "apex": ("amp_C", "apex.multi_tensor_apply", "apex.optimizers"),
}


def why_missing(name: str) -> str | None:
    """Why the package ``name`` cannot be used; None where it can.

    One that is found is imported, with torch; where that fails, it is hidden in this process.
    """
    hidden = name in sys.modules and sys.modules[name] is None
    if not hidden and importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    reason = import_failure(name)
    return reason and f"{name} is installed but does not import ({reason})"


def hide_broken() -> None:
    """Before megatron-core is imported: let it find no package that does not import."""
    for name in _MODULES:
        why_missing(name)


@functools.cache
def import_failure(name: str) -> str | None:
    """What an import of the package says, shortened; None where it works.  Hides one that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torch")  # extensions need its libraries loaded
            for module in _MODULES.get(name, (name,)):
                importlib.import_module(module)
    except Exception as error:  # of any kind: OSError for a library, RuntimeError, AssertionError
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
        sys.modules[name] = None  # type: ignore[assignment]  # Python's mark for "not to be found"
        return shorten(f"{type(error).__name__}: {error}", 100, placeholder=" ...")
    return None
