"""The device of a stage, leased before anything computes on it."""

import torch

from tcbench.errors import UserError
from tcbench.outside.devices import check_seen, lease, uses_gpus


def leased_device(suite: str, device: str, alone: bool = False) -> torch.device:
    """The device that a suite of this name asks for; a GPU is leased for this process, which waits until one is free.

    Args:
        alone: share it with no other job.

    Raises:
        UserError: it is not there.
    """
    if uses_gpus(device):
        try:
            lease(alone=alone)
        except UserError as error:
            raise UserError(f"suite {suite}: device {device}: {error}") from error
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"suite {suite}: device cuda, but torch finds no usable GPU; set device: cpu")
        torch.cuda.init()
        check_seen(torch.cuda.device_count())
    return torch.device(device)
