"""How many multiplications the fast path's algorithm needs, counted as direct convolutions.

Minimal filtering makes do with fewer; channels are counted as if half of the coarse trunk's were
dropped, as published.
"""

from torch import Tensor

from inpainter.fast.attention import PATCH_MARGIN, FastAttention
from inpainter.fast.geometry import Region
from inpainter.fast.layers import FastLayer
from inpainter.fast.scorer import FastScorer
from inpainter.fast.stages import Chain

PUBLISHED_LIVE = 9  # coarse conv2 … conv10


def completion_macs(scorer: FastScorer, windows: Tensor) -> float:
    """Multiply-adds of one completion of one window, critic included, p = 0.5."""
    coarse, fine = scorer.stages_for((windows.shape[2], windows.shape[3]))
    total = critic_macs(scorer)
    for i, layer in enumerate(coarse.chain.layers[1:], start=1):
        inputs = 0.5 if i <= PUBLISHED_LIVE else 1.0
        outputs = 0.5 if i < PUBLISHED_LIVE else 1.0
        total += inputs * outputs * layer_macs(layer, coarse.chain.needed[i])
    if fine is None:
        return total
    for changed in fine.shared_chains(frozenset()):
        pairs = zip(changed.chain.layers, changed.changed, strict=True)
        total += sum(layer_macs(layer, region) for layer, region in pairs)
    total += chain_macs(fine.matched) + chain_macs(fine.decoder)
    return total + attention_macs(fine.attend)


def prepared_macs(scorer: FastScorer, windows: Tensor) -> float:
    """Multiply-adds that the completions of one window share."""
    coarse, fine = scorer.stages_for((windows.shape[2], windows.shape[3]))
    conv1 = coarse.first
    total = critic_macs(scorer) + conv1.weight.numel() * coarse.chain.input_needed.area
    total += layer_macs(coarse.chain.layers[0], coarse.chain.needed[0])
    if fine is None:
        return total
    for changed in fine.shared_chains(frozenset()):
        pairs = zip(changed.chain.layers, changed.static, strict=True)
        total += sum(layer_macs(layer, r) for layer, r in pairs if r is not None)
    return total


def chain_macs(chain: Chain) -> float:
    pairs = zip(chain.layers, chain.needed, strict=True)
    return sum(layer_macs(layer, region) for layer, region in pairs)


def layer_macs(layer: FastLayer, region: Region) -> float:
    """Of a layer's output region; an upsampling layer's four phases have 2x2 kernels."""
    return layer.weight.numel() / layer.phases * region.area


def attention_macs(attend: FastAttention) -> float:
    """Of its matrix products, for one window."""
    margin = PATCH_MARGIN if attend.inside else 0
    queries = [side + 2 * margin for side in attend.queries.hw]
    cells = [side - 2 * (margin > 0) for side in attend.queries.hw]
    keys = attend.grid[0] * attend.grid[1] * attend.channels
    return float(keys * (queries[0] * queries[1] + 4 * cells[0] * cells[1]))


def critic_macs(scorer: FastScorer) -> float:
    if scorer.critic is None:
        return 0.0
    h, w = scorer.mask_hw
    convs = [block.conv for block in scorer.critic.dis_conv_module.children()]
    sides = ((h >> i) * (w >> i) for i in range(1, len(convs) + 1))
    return float(sum(c.weight.numel() * area for c, area in zip(convs, sides, strict=True)))
