"""Every method that the benchmarks compare, by its name in their tables; what a method computes with is loaded later.

A method of your own: a file with a function that makes the adapter, and a line here, or `METHODS.add` in your program.
"""

from typing import Any

from peft_psr.registry import Registry

from .method import Method


_PAPER, _OURS = "arXiv 2605.03907", "this project"


def _psr(
    name: str, gate: str, layers: str, objective: str, start: str = "live", source: str = _PAPER, **options: Any
) -> Method:
    """A PSR adapter of one layer or of all, trained by `PSRTrainer`."""
    options = {"gate": gate, "all_layers": layers == "all", "objective": objective, "start": start, **options}
    shown = "open gates" if start == "live" else start
    return Method(name, f"{__package__}.psr:fit", objective, shown, source, options)


def _method(name: str, module: str, objective: str, start: str, source: str, **more: Any) -> Method:
    return Method(name, f"{__package__}.{module}:fit", objective, start, source, **more)


METHODS = Registry(
    "method",
    {
        method.name: method
        for method in (
            _method("S-Const DiM", "mean_difference", "none", "mean_difference", "arXiv 2312.06681"),
            _method("S-Const ActAdd", "actadd", "none", "one pair of prompts", "arXiv 2308.10248"),
            _method("ITI", "iti", "none", "heads by a probe", "arXiv 2306.03341"),
            _method("Stolfo et al.", "stolfo", "none", "mean projection", "arXiv 2410.12877"),
            _method("S-ReFT-r1", "reft_r1", "ll", "linear", "arXiv 2501.17148"),
            _psr("S-Const MSE", "constant", "one", "mse"),
            _psr("S-Const LL", "constant", "one", "ll", learning_rate=5e-2),
            _method("S-Const RePS", "reps", "reps", "linear", "arXiv 2505.20809"),
            *(
                _method(name, "loreft", objective, "orthogonal", "arXiv 2404.03592", options={"objective": objective})
                for name, objective in (("S-LoReFT LL", "ll"), ("S-LoReFT RePS", "reps"))
            ),
            _psr("S-PSR MSE", "relu", "one", "mse"),
            _psr("S-PSR LL", "relu", "one", "ll"),
            _psr("S-PSR KL r=8", "relu", "one", "kl", source=_OURS, r=8),
            _psr("A-Const MSE", "constant", "all", "mse"),
            _psr("A-PSR MSE", "relu", "all", "mse"),
            _psr("A-PSR LL", "relu", "all", "ll"),
            _psr("A-PSR MSE ridge", "relu", "all", "mse", "ridge", source=_OURS),
            _psr("A-PSR KL", "relu", "all", "kl", source=_OURS),
            _psr("A-PSR KL r=8", "relu", "all", "kl", source=_OURS, r=8),
            *(
                _method(f"LoRA r={r}", "lora", "ll", "B = 0", "arXiv 2106.09685", options={"r": r}, every_token=True)
                for r in (1, 8)
            ),
        )
    },
)
"""Methods by name."""
