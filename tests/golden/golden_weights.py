"""Weights that the golden data gives as a rule instead of as numbers."""

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

_NUMBER = r"([0-9]*\.?[0-9]+)"


def _find(pattern: str, rule: str, default: float) -> float:
    match = re.search(pattern, rule)
    return float(match.group(1)) if match else default


def weights_by_rule(
    rule: str, names_and_shapes: Mapping[str, Sequence[int]]
) -> dict[str, torch.Tensor]:
    """The state dict that `rule` (a manifest's `settings.weights`) describes, float32.

    Each tensor is drawn by numpy's RandomState(crc32(prefix + name)); the prefix, the gains and the
    spreads are read from the rule's text, so another folder's rule works as well.
    """
    prefix = re.search(r"crc32\(b'([^']*)'", rule)
    if prefix is None:
        raise ValueError(f"no crc32(b'…') in the rule for the weights: {rule!r}")
    gain_4d = _find(rf"g = {_NUMBER} for ndim 4", rule, 1.0)
    gain_2d = _find(rf"g = {_NUMBER} for ndim 2", rule, 1.0)
    mean_spread = _find(rf"running_mean = {_NUMBER} v", rule, 0.1)
    variance_spread = _find(rf"running_var = 1 \+ {_NUMBER} \|v\|", rule, 0.5)
    scale_spread = _find(rf"\(BatchNorm scale\) = 1 \+ {_NUMBER} v", rule, 0.1)
    bias_spread = _find(rf"\(biases\) = {_NUMBER} v", rule, 0.1)
    weights = {}
    for name, shape in names_and_shapes.items():
        seed = zlib.crc32((prefix.group(1) + name).encode())
        v = np.random.RandomState(seed).standard_normal(tuple(shape))
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros((), dtype=torch.int64)
            continue
        if name.endswith("running_mean"):
            values = mean_spread * v
        elif name.endswith("running_var"):
            values = 1 + variance_spread * np.abs(v)
        elif len(shape) == 1:
            values = 1 + scale_spread * v if name.endswith(".weight") else bias_spread * v
        else:
            gain = gain_4d if len(shape) == 4 else gain_2d
            values = v * np.sqrt(gain / np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return weights


def parse_shapes(names: Sequence[str], shapes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """{'conv1.weight': (64, 3, 7, 7), …} from the recorded names and '[64, 3, 7, 7]' texts."""
    numbers = [tuple(int(n) for n in re.findall(r"\d+", text)) for text in shapes]
    return dict(zip(map(str, names), numbers, strict=True))


def check_sums(weights: Mapping[str, torch.Tensor], names, sums, norms, *, rtol: float) -> None:
    """Asserts that every tensor has the recorded sum and L2 norm, in float64."""
    for name, total, norm in zip(map(str, names), sums, norms, strict=True):
        values = weights[name].double()
        np.testing.assert_allclose(values.norm(), norm, rtol=rtol, err_msg=f"{name}: L2 norm")
        # A sum of mixed signs is compared on the scale of the norm, times sqrt(numel).
        slack = rtol * max(abs(total), norm * values.numel() ** 0.5)
        np.testing.assert_allclose(values.sum(), total, rtol=0, atol=slack, err_msg=f"{name}: sum")
