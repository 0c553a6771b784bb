"""The judges by name; a recipe's `judge` is one of them. `JUDGES.add("mine", Mine)` adds another."""

from peft_psr.registry import Registry

from .base import Judge


JUDGES: Registry[type[Judge]] = Registry(
    "judge",
    {
        "grammar": "peft_psr.training.judges.grammar:GrammarJudge",
        "ifeval": "peft_psr.training.judges.ifeval:IFEvalJudge",
        "server": "peft_psr.training.judges.server:ServerJudge",
        "local": "peft_psr.training.judges.local:LocalJudge",
    },
)
