"""The processes of a training run: one, or those that torchrun started, over NCCL on GPUs and gloo on CPUs."""

import torch
from accelerate import Accelerator, PartialState


def processes() -> PartialState:
    """The process group: how many there are (`num_processes`) and which one this is (`process_index`)."""
    return PartialState(cpu=not torch.cuda.is_available())


def accelerator() -> Accelerator:
    """accelerate's Accelerator over the same processes; precision is left to the model."""
    processes()
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
