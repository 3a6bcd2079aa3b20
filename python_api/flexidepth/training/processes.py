"""The processes of a run: one, or those that `accelerate launch` or torch.distributed started."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

_PATIENCE = timedelta(hours=6)  # for the process that prepares the text of all


def all_processes() -> Any:
    """accelerate's PartialState of this run."""
    # Told of the CPU, or several processes on CPUs would each take themselves for the only one.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
