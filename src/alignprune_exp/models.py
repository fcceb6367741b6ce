"""Networks: torchvision's blocks, with a stem for small images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch import distributed as dist

if TYPE_CHECKING:
    from .config import Narrow, ResNet

Norm = Callable[[int], nn.Module]  # from a number of channels to a normalisation


def build(config: Narrow | ResNet, channels: int, classes: int) -> nn.Module:
    """Return the network for images (B, channels, H, W) and logits (B, classes), freshly initialised."""
    norm = _group_norm if config.norm == "group" else nn.BatchNorm2d
    network: nn.Module
    if config.name == "small_cnn":
        network = small_cnn(channels, classes, config.width, norm)
    elif config.name == "resnet8":
        network = NarrowResNet(channels, classes, config.width, norm)
    else:
        network = _resnet(config, channels, classes, norm)
    if config.norm == "sync" and dist.is_initialized():
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


@contextmanager
def embeddings(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, batch by batch, what goes into the network's last linear layer (B, d), until the block ends."""
    *_, head = (module for module in network.modules() if isinstance(module, nn.Linear))
    collected: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: collected.append(inputs[0].detach().float()))
    try:
        yield collected
    finally:
        handle.remove()


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def small_cnn(channels: int, classes: int, width: int, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        norm(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        norm(2 * width),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


class NarrowResNet(nn.Module):
    """CIFAR ResNet of 8 layers (He et al., 2016, section 4.2): three stages of one basic block each."""

    def __init__(self, channels: int, classes: int, width: int, norm: Norm = nn.BatchNorm2d) -> None:
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
        ]
        planes = width
        for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(nn.Conv2d(planes, out, 1, stride, bias=False), norm(out))
            layers.append(BasicBlock(planes, out, stride, shortcut, norm_layer=norm))
            planes = out
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(planes, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.features(x_BCHW))


def _resnet(config: ResNet, channels: int, classes: int, norm: Norm) -> nn.Module:
    import torchvision.models

    network = getattr(torchvision.models, config.name)(num_classes=classes, norm_layer=norm)
    if config.stem == "small":
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network
