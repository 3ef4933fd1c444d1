"""Random numbers: seeds and generators, and their state for a run that goes on."""

import hashlib
import operator
import random
from typing import Any

import numpy as np
import torch

from common.checkpoint import CheckpointError


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators (the last on every device).

    Code of this project draws from generators of its own (see generator_for); this is for what
    other libraries draw and for weights and dropout, which take PyTorch's global one.
    """
    random.seed(seed)
    # The one place: other libraries draw from NumPy's global generator.
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def seed_from(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part: from the first 8 bytes of a SHA-256.

    Raises TypeError for a part that is neither an integer nor a string.
    """
    text = "\0".join(
        f"s{part}" if isinstance(part, str) else f"i{operator.index(part)}" for part in parts
    )
    # names of files need not be UTF-8
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A random generator that depends on the parts alone (1 and "1" are different parts).

    What is drawn for ("crop", step 7) is the same in whatever order steps are taken, in whichever
    process, and after a resume.
    """
    return torch.Generator().manual_seed(seed_from(*parts))


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
