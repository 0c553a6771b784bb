"""How many threads torch computes with on a CPU: by the model's size, unless the user has said.

Threads wait for each other at every operation. In a model as small as the embedded one an operation takes less time
than that, so one thread is as fast as two where nothing else runs, with half the processor time, and many times
faster where something does.
"""

import os
from collections.abc import Mapping

import torch


SMALL = 20_000_000
"""Parameters below which a model is computed with one thread."""
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""What a user says it by."""
_BEFORE = torch.get_num_threads()
_chosen = _BEFORE


def choose_threads(model: torch.nn.Module, environment: Mapping[str, str] = os.environ) -> None:
    """Set torch's threads for a model: one for a small one, else as many as torch took at first.

    Nothing is changed where one of `VARIABLES` is set, the program has called `torch.set_num_threads`, or the model is
    not on the CPU.
    """
    global _chosen
    said = any(environment.get(name) for name in VARIABLES) or torch.get_num_threads() != _chosen
    if said or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return
    size = sum(parameter.numel() for parameter in model.parameters())
    _chosen = 1 if size < SMALL else _BEFORE
    torch.set_num_threads(_chosen)
