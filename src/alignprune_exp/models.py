"""Networks: torchvision's blocks, with a stem for small images, or its weights for large ones."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from .errors import UsageError, reason_of
from .schema import Neutral

Norm = Callable[[int], nn.Module]  # from a number of channels to a normalisation
Kind = Annotated[Literal["batch", "sync", "group"], Neutral("batch")]  # of normalisation
Width = Annotated[int, Field(ge=1, le=1024)]  # channels of the first layer or stage


def small_cnn(channels: int, classes: int, *, width: Width, norm: Kind) -> nn.Module:
    """Two convolutions and a linear layer."""
    normed = normalisation(norm)
    network = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        normed(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        normed(2 * width),
        nn.ReLU(inplace=True),
        Quarters(),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )
    return synchronised(network, norm)


def resnet8(channels: int, classes: int, *, width: Width, norm: Kind) -> nn.Module:
    """See `NarrowResNet`."""
    return synchronised(NarrowResNet(channels, classes, width, normalisation(norm)), norm)


def _torchvisions(name: str) -> Callable[..., nn.Module]:
    def resnet(
        channels: int,
        classes: int,
        *,
        stem: Literal["small", "large"],
        weights: Annotated[Literal["none", "imagenet"], Neutral("none")],
        norm: Kind,
    ) -> nn.Module:
        """torchvision's, with a stem for small images, or its weights. Raises UsageError where these cannot be had."""
        return synchronised(_resnet(name, channels, classes, stem, weights, norm), norm)

    return resnet


# Each makes a network for images (B, channels, H, W) and logits (B, classes), freshly initialised but for its weights;
# what is for one task alone stands in the task's file.
MODELS: dict[str, Callable[..., nn.Module] | str] = {
    "small_cnn": small_cnn,
    "resnet8": resnet8,
    "resnet18": _torchvisions("resnet18"),
    "resnet50": _torchvisions("resnet50"),
    "gpt": "tasks.language.gpt",
    "unet": "tasks.segmentation.unet",
    "lraspp": "tasks.segmentation.lraspp",
    "deeplabv3": "tasks.segmentation.deeplabv3",
    "fcos_small": "tasks.detection.fcos_small",
    "fcos": "tasks.detection.fcos",
    "mlp": "tasks.regression.mlp",
}


def normalisation(kind: str) -> Norm:
    return _group_norm if kind == "group" else nn.BatchNorm2d


def synchronised(network: nn.Module, norm: str) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if norm == "sync" and dist.is_initialized() else network


def last_linear(network: nn.Module) -> nn.Linear:
    """Return the network's last linear layer. Raises UsageError for a network without one."""
    if layers := [module for module in network.modules() if isinstance(module, nn.Linear)]:
        return layers[-1]
    raise UsageError(
        "the network has no torch.nn.Linear, and what goes into its last one is asked for; let it end in one, or use "
        "another pruner or score"
    )


@contextmanager
def embeddings(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, batch by batch, what goes into the network's last linear layer (B, d), until the block ends."""
    head = last_linear(network)
    collected: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: collected.append(inputs[0].detach().float()))
    try:
        yield collected
    finally:
        handle.remove()


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class Quarters(nn.Module):
    """The means of an image's quarters, as of AdaptiveAvgPool2d(2), whose gradient CUDA has no fixed order for."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        return F.avg_pool2d(x_BCHW, (height - height // 2, width - width // 2), (height // 2, width // 2))


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


def _resnet(name: str, channels: int, classes: int, stem: str, weights: str, norm: str) -> nn.Module:
    import torchvision.models

    network = getattr(torchvision.models, name)(num_classes=classes, norm_layer=normalisation(norm))
    if weights == "imagenet":
        if stem == "small" or channels != 3 or norm == "group":
            raise UsageError(
                "model.weights=imagenet fits colour images, model.stem=large and model.norm=batch or sync: set these, "
                "or model.weights=none"
            )
        network.load_state_dict(_published(name) | _head(network))
        return network
    if stem == "small":
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


def _head(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that depend on the number of classes."""
    return {name: value for name, value in network.state_dict().items() if name.startswith("fc.")}


def _published(name: str) -> dict[str, Tensor]:
    """Return torchvision's weights (ILSVRC-12, first version), downloaded into torch's cache where they are not there.

    The name of their file ends in the first digits of its sha256, by which it is checked in either case.
    """
    import torchvision.models

    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    digits = file.stem.rpartition("-")[2]
    instead = f"put {file.name} from {weights.url} into {file.parent}, or set model.weights=none"
    try:
        if file.exists() and not hashlib.sha256(file.read_bytes()).hexdigest().startswith(digits):
            raise UsageError(f"{file} is damaged, since its sha256 does not begin with {digits}: {instead}")
        return weights.get_state_dict(check_hash=True, progress=False, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"torchvision's weights of {name} cannot be had ({reason_of(error)}): {instead}") from error
