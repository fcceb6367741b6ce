"""Networks: output shapes on small images, and the depth of the narrow ResNet."""

import re

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from alignprune_exp.config import MODEL
from alignprune_exp.models import Quarters


def node(**values):
    return MODEL.read(values)


CONFIGS = [
    node(name="small_cnn", width=8, norm="batch"),
    node(name="resnet8", width=8, norm="batch"),
    node(name="resnet18", stem="small", weights="none", norm="batch"),
    node(name="resnet18", stem="large", weights="none", norm="batch"),
    node(name="resnet50", stem="small", weights="none", norm="batch"),
    node(name="resnet50", stem="large", weights="none", norm="batch"),
    node(name="small_cnn", width=10, norm="group"),
    node(name="resnet8", width=8, norm="group"),
    node(name="resnet18", stem="small", weights="none", norm="group"),
]


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.model_dump().values())))
def test_one_finite_logit_a_class_and_a_gradient_for_every_parameter(config, channels, side):
    torch.manual_seed(0)
    network = MODEL.make(config, channels, 7).train()
    logits = network(torch.randn(4, channels, side, side))
    assert logits.shape == (4, 7)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_no_layers_gradient_is_one_that_cuda_refuses_to_compute_deterministically():
    refused = set(
        re.findall(
            r"torch\.nn\.(\w+)` when attempting to differentiate", str(torch.use_deterministic_algorithms.__doc__)
        )
    )
    assert "AdaptiveAvgPool2d" in refused
    for config in CONFIGS:
        for module in MODEL.make(config, 3, 7).modules():
            to_one = getattr(module, "output_size", None) in (1, (1, 1))  # which torch computes as a mean
            assert type(module).__name__ not in refused or to_one


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (7, 5), (2, 3)])
def test_quarters_are_those_of_adaptive_pooling(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert torch.allclose(Quarters()(x), nn.AdaptiveAvgPool2d(2)(x))


def test_resnet8_has_eight_weight_layers_on_its_main_path_and_torchvisions_blocks():
    network = MODEL.make(node(name="resnet8", width=12, norm="batch"), 3, 10)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert len([name for name in layers if "downsample" not in name]) == 8
    blocks = [m for m in network.modules() if isinstance(m, BasicBlock)]
    assert [block.conv1.out_channels for block in blocks] == [12, 24, 48]
    assert [block.stride for block in blocks] == [1, 2, 2]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_small_stem_keeps_the_resolution_that_the_large_one_divides_by_four(name):
    def first_stage_side(stem):
        network = MODEL.make(node(name=name, stem=stem, weights="none", norm="batch"), 3, 2).eval()
        seen = []
        network.layer1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-1]))
        network(torch.zeros(1, 3, 32, 32))
        return seen[0]

    assert (first_stage_side("small"), first_stage_side("large")) == (32, 8)


@pytest.mark.parametrize("name", ["small_cnn", "resnet8"])
def test_width_scales_the_number_of_parameters(name):
    def size(width):
        return sum(p.numel() for p in MODEL.make(node(name=name, width=width, norm="batch"), 3, 10).parameters())

    assert size(16) > 2 * size(8)


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda c: c.name)
def test_with_group_norm_a_samples_logits_are_its_own(config):
    torch.manual_seed(0)
    network = MODEL.make(config.model_copy(update={"norm": "group"}), 3, 5).train()
    images = torch.randn(6, 3, 16, 16)
    torch.testing.assert_close(network(images)[:2], network(images[:2]))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def test_same_torch_seed_gives_the_same_weights():
    def weights():
        torch.manual_seed(3)
        return MODEL.make(node(name="resnet8", width=8, norm="batch"), 3, 10).state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[key], second[key]) for key in first)
