"""The processes of a training run: one, or those that torchrun started, over NCCL on GPUs and gloo on CPUs."""

import torch
from accelerate import Accelerator, PartialState


def processes() -> PartialState:
    """How many there are (`num_processes`), which is this (`process_index`), and their meeting point."""
    return PartialState(cpu=not torch.cuda.is_available())


def accelerator() -> Accelerator:
    """accelerate's door to the same processes; precision is the model's own business."""
    processes()
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
