"""Multiply-accumulate operations against the published table and by hand."""

import pytest
import torch
from torch import nn

from dia.macs import Macs, count_macs, describe_macs, dissolving_macs, encoder_macs
from dia.settings import ContrastiveConfig, DiaConfig
from diffusion_models.settings import DataConfig


def config(resolution: int) -> DiaConfig:
    contrastive = ContrastiveConfig(
        shift_trans_type="diffusion_rotation", diff_resolution=resolution
    )
    return DiaConfig(data=DataConfig(dataset="kvasir"), contrastive=contrastive)


def test_convolution_is_counted_as_one_product_per_weight_and_output_pixel() -> None:
    with torch.device("meta"):
        layer = nn.Conv2d(2, 3, 3, bias=False)
    macs = count_macs(layer, lambda: layer(torch.empty(1, 2, 6, 6, device="meta")))
    assert macs == Macs(2 * 3 * 9 * 16, 2 * 3 * 9 * 16)


@pytest.mark.parametrize(("resolution", "published"), [(32, 2.33), (64, 3.84), (128, 9.90)])
def test_published_column_is_matched_and_leaves_products_out(resolution, published) -> None:
    parts = (encoder_macs(config(resolution)), dissolving_macs(config(resolution)))
    assert round(sum(macs.published for macs in parts) / 1e9, 2) == published
    assert sum(macs.every for macs in parts) > 1.5 * published * 1e9


def test_description_names_both_networks_and_their_sum() -> None:
    text = describe_macs(config(32))
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        "resnet18_imagenet",
        "dissolving",
        "total",
    ]
