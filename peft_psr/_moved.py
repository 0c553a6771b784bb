"""Import paths of earlier versions, which documents and users' code name, lead to where the modules are now."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


MOVED = {
    "peft_psr.chat": "peft_psr.prompts.conversations",
    "peft_psr.chat_template": "peft_psr.prompts.chat_template",
    "peft_psr.facts": "peft_psr.hub.facts",
    "peft_psr.loading": "peft_psr.base_model.loading",
    "peft_psr.model_card": "peft_psr.hub.model_card",
    "peft_psr.rank_cut": "peft_psr.combination.rank_cut",
    "peft_psr.saved_adapters": "peft_psr.hub.saved_adapters",
    "peft_psr.sharing": "peft_psr.hub.push",
    "peft_psr.training.collator": "peft_psr.training.data.collator",
    "peft_psr.training.placement": "peft_psr.training.data.placement",
    "peft_psr.training.traits": "peft_psr.training.sources.personas",
    "peft_psr.evaluation.chat": "peft_psr.hub.steered_model",
}
"""{old path: new path}."""


class _Alias(Loader):
    """Gives the module of the new path under the old one too: one module with two names."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself, imported if need be."""
        module = import_module(MOVED[spec.name])
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run; the import system has just set another `__spec__`."""
        module.__spec__ = self._own


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """An alias, for an old path."""
        return ModuleSpec(fullname, _Alias()) if fullname in MOVED else None


def keep_old_paths() -> None:
    """Has the import system know the old paths."""
    if not any(
        type(finder).__qualname__ == _Finder.__qualname__ and type(finder).__module__ == __name__
        for finder in sys.meta_path
    ):
        sys.meta_path.append(_Finder())
