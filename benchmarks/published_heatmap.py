"""The published way of scoring windows, as a yardstick: the same numbers, all of its work.

M copies of every window run through the whole network, attention is a loop over samples made of
convolutions, the ground truth's features are computed once per completion, ELU is torch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from inpainter.completion import WindowScorer, l2_distance, metric_values
from inpainter.networks.attention import NORM_EPSILON, SOFTMAX_SCALE
from inpainter.networks.dropout import ChannelDropout, ChannelMasks
from inpainter.networks.generator import CoarseGenerator, FineGenerator, Stage, with_mask_planes
from inpainter.windows import centre_crop, centre_mask


class PublishedScorer(WindowScorer):
    """Called as WindowScorer is; the images of a batch are tiled M times, as published."""

    @torch.inference_mode()
    def __call__(self, windows: Tensor, masks: ChannelMasks) -> dict[str, Tensor]:
        """Scores of a batch: every metric's (N,) values, larger = more anomalous."""
        count = len(windows)
        truth = centre_crop(windows, self.mask_hw).repeat(masks.M, 1, 1, 1)
        completions = centre_crop(self.complete_all(windows, masks), self.mask_hw)
        spaces = {"image": (truth, completions)}
        if "feature" in self.spaces:
            features = self.feature_network.features
            spaces["feature"] = (features(truth), features(completions))
        distances = {
            space: l2_distance(*pair).view(masks.M, count).t() for space, pair in spaces.items()
        }
        return metric_values(self.metrics, distances)

    def complete_all(self, windows: Tensor, masks: ChannelMasks) -> Tensor:
        """All completions at once, pasted into the windows: (M * N, C, H, W)."""
        keep = {name: kept.transpose(0, 1).flatten(0, 1) for name, kept in masks.keep.items()}
        drop = ChannelDropout(keep, masks.p)  # of M * N windows, completion by completion
        images = windows.repeat(masks.M, 1, 1, 1)
        hw = (windows.shape[2], windows.shape[3])
        mask = centre_mask(hw, self.mask_hw, windows.device).expand(len(images), -1, -1, -1)
        known = images * (1 - mask)
        result = coarse(self.generator.coarse_generator, known, mask, drop).clamp(-1, 1)
        if self.generator.fine_generator is not None:
            filled = known + result * mask
            result = fine(self.generator.fine_generator, filled, mask, drop).clamp(-1, 1)
        return result * mask + images * (1 - mask)


def coarse(
    stage: CoarseGenerator, known: Tensor, mask: Tensor, drop: ChannelDropout | None
) -> Tensor:
    """The coarse stage; unclamped."""
    return run(stage, with_mask_planes(known, mask), "", 1, 17, drop)


def fine(stage: FineGenerator, filled: Tensor, mask: Tensor, drop: ChannelDropout | None) -> Tensor:
    """The fine stage with the attention of one sample after the other; unclamped."""
    x = with_mask_planes(filled, mask)
    branch = run(stage, x, "", 1, 10, drop)
    features = run(stage, x, "pm", 1, 6, drop)
    attended = torch.cat([attention(sample[None], mask[:1]) for sample in features])
    attended = run(stage, attended, "pm", 9, 10, drop)
    return run(stage, torch.cat([branch, attended], dim=1), "all", 11, 17, drop)


def run(
    stage: Stage, x: Tensor, prefix: str, first: int, last: int, drop: ChannelDropout | None
) -> Tensor:
    """The layers `<prefix>conv<first>` … `<prefix>conv<last>`, each by torch's own convolution."""
    for layer, block in stage.layers(prefix, first, last):
        if layer in stage.UPSAMPLE_BEFORE:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = block.activated(block.conv(x))
        if drop is not None and layer not in stage.NEVER_DROP:
            x = drop(f"{stage.name}.{layer}", x)
    return x


def attention(features: Tensor, mask: Tensor) -> Tensor:
    """Contextual attention of one sample (1, C, H, W) by convolutions with its own patches."""
    channels, height, width = features.shape[1:]
    h, w = height // 2, width // 2
    values = F.unfold(features, 4, stride=2, padding=1)[0].t().reshape(h * w, channels, 4, 4)
    small = features[:, :, ::2, ::2]
    keys = F.unfold(small, 3, padding=1)[0].t().reshape(h * w, channels, 3, 3)
    keys = keys / (keys.square() + NORM_EPSILON).sum(dim=(1, 2, 3), keepdim=True).sqrt()
    hole = F.unfold(mask[:, :, ::8, ::8].to(features.dtype), 3, padding=1).mean(1)  # (1, L)
    usable = (hole == 0).to(features.dtype).view(1, -1, 1, 1)
    logits = F.conv2d(small, keys, padding=1)  # (1, L keys, h, w)
    diagonal = torch.eye(3, device=features.device, dtype=features.dtype)[None, None]
    logits = F.conv2d(logits.view(1, 1, h * w, h * w), diagonal, padding=1)
    logits = logits.view(1, h, w, h, w).permute(0, 2, 1, 4, 3).reshape(1, 1, h * w, h * w)
    logits = F.conv2d(logits, diagonal, padding=1)
    logits = logits.view(1, w, h, w, h).permute(0, 2, 1, 4, 3).reshape(1, h * w, h, w)
    weights = torch.softmax(logits * usable * SOFTMAX_SCALE, dim=1) * usable
    return F.conv_transpose2d(weights, values, stride=2, padding=1) / 4
