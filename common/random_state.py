"""The state of all random generators, for a run that is to go on as if never stopped."""

import random
from typing import Any

import numpy as np
import torch

from common.checkpoint import CheckpointError


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and PyTorch's generators, in types that load_tensors reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_random_state(state: Any, source: str) -> None:
    """Puts back what random_state returned; GPUs only where their number is the same.

    Raises CheckpointError, naming the source, where it is something else.
    """
    try:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state(  # noqa: NPY002
            (kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss)
        )
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: the state of the random generators is not one ({type(error).__name__}). "
            "Go on from another step."
        ) from error
