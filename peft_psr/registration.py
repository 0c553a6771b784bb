"""Enters the adapter type "PSR" in PEFT's tables, which is all that PEFT and transformers look at.

PEFT and torch take seconds to import, so `import peft_psr` does not import them: it registers at once where PEFT is
there already, otherwise as soon as it is, whoever imports it (transformers does, when it meets an adapter).
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import dropwhile
from threading import Lock, local
from types import ModuleType


def register() -> None:
    """Make PEFT know `PSRConfig`; calling it again is harmless.

    Raises:
        RuntimeError: this version of PEFT has a type "PSR" of its own.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    from .config import PSRConfig, PSRPeftType
    from .model import PSRModel

    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PSRPeftType.PSR)  # type: ignore[call-overload]
    if "PSR" in PeftType.__members__ or (registered is not None and registered.__name__ != PSRConfig.__name__):
        raise RuntimeError(
            "PEFT already has an adapter type 'PSR' that is not peft-psr's. Upgrade peft-psr, or use a version of "
            "PEFT that both agree on."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[PSRPeftType.PSR] = PSRConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[PSRPeftType.PSR] = PSRModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[PSRPeftType.PSR] = PSRModel.prefix  # type: ignore[index]


def register_with_peft() -> None:
    """`register()`: now if PEFT is imported, otherwise right after it."""
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


class _AfterPeft(MetaPathFinder):
    """Registers at the end of the outermost import, of PEFT or of a module of ours, that has brought PEFT in.

    Not at the end of PEFT's own where a module of ours imports it: the adapter's classes may need that module, which
    is then half there.
    """

    def __init__(self) -> None:
        self._thread = local()
        self._lock = Lock()
        self._importing = 0  # threads that are importing one of these modules
        self._peft_has_run = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the finders after this one find; running it is followed by the registration."""
        if fullname != "peft" and not fullname.startswith("peft_psr."):
            return None
        after = list(dropwhile(lambda finder: finder is not self, sys.meta_path))[1:]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in after)), None)
        loader = None if spec is None else spec.loader
        if loader is not None and not isinstance(loader.exec_module, partial):  # some loaders serve several modules
            loader.exec_module = partial(self._exec, loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _exec(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        outermost = not getattr(self._thread, "inside", False)
        if outermost:
            self._enter(1)
        try:
            run(module)
            self._peft_has_run |= module.__name__ == "peft"
            if outermost and self._peft_has_run and self in sys.meta_path:
                self._register()
        finally:
            if outermost:
                self._enter(-1)

    def _enter(self, step: int) -> None:
        with self._lock:
            self._importing += step
        self._thread.inside = step > 0

    def _register(self) -> None:
        try:
            register()
        except ImportError:
            if self._importing > 1:
                return  # another thread waits for PEFT in a module of ours that is needed here: it will register
            register()
        with suppress(ValueError):
            sys.meta_path.remove(self)
