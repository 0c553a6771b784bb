"""Enters the adapter type "PSR" in PEFT's tables, which is all that PEFT and transformers look at."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from .config import PSRConfig, PSRPeftType
from .model import PSRModel


def register() -> None:
    """Make PEFT know `PSRConfig`; calling it again is harmless.

    Raises:
        RuntimeError: this version of PEFT has a type "PSR" of its own.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PSRPeftType.PSR)  # type: ignore[call-overload]
    if "PSR" in PeftType.__members__ or (registered is not None and registered.__name__ != PSRConfig.__name__):
        raise RuntimeError(
            "PEFT already has an adapter type 'PSR' that is not peft-psr's. Upgrade peft-psr, or use a version of "
            "PEFT that both agree on."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[PSRPeftType.PSR] = PSRConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[PSRPeftType.PSR] = PSRModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[PSRPeftType.PSR] = PSRModel.prefix  # type: ignore[index]
