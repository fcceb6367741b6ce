"""Dynamic pruning in a training loop of one's own: scikit-learn's digits, of which 35 % are labelled wrongly.

python scripts/own_loop.py
torchrun --nproc_per_node=2 scripts/own_loop.py
"""

import os

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from alignprune_exp.pruning import DynamicPruning

EPOCHS, BATCH, CLASSES, NOISE = 30, 64, 10, 0.35
TRUSTED, TEST = 100, 400  # samples


def digits(rng):
    """Return which labels of the training set are wrong, that set, the trusted one, and the test set."""
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    images, labels = torch.tensor(images[order] / 16, dtype=torch.float32), labels[order]
    wrong = rng.random(len(labels)) < NOISE
    wrong[: TRUSTED + TEST] = False
    given = torch.tensor((labels + wrong * rng.integers(1, CLASSES, len(labels))) % CLASSES)
    trusted, test, train = slice(TRUSTED), slice(TRUSTED, TRUSTED + TEST), slice(TRUSTED + TEST, None)
    sets = (TensorDataset(images[part], given[part]) for part in (train, trusted, test))
    return wrong[train], *sets


def train(model, dataset, trusted, world_size):
    """Train as the README has it; return the pruning."""
    net = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pruning = DynamicPruning(dataset, epochs=EPOCHS, pruner="infobatch", score="das", window=10, seed=0)
    scheduler = LambdaLR(optimizer, pruning.schedule(lambda progress: 1 - progress))
    loader = DataLoader(pruning, batch_size=BATCH // world_size, sampler=pruning.sampler)
    for _ in range(EPOCHS):
        for index, (x, y) in loader:
            loss = pruning.update(index, F.cross_entropy(net(x), y, reduction="none"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        pruning.end_epoch(reference_loss(model, trusted))
    return pruning


def reference_loss(model, trusted):
    """Return the mean loss on the trusted set, in eval mode."""
    model.eval()
    with torch.no_grad():
        x, y = trusted[:]
        loss = F.cross_entropy(model(x), y)
    model.train()
    return loss


def main():
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun says so
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wrong, dataset, trusted, test = digits(np.random.default_rng(0))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    pruning = train(model, dataset, trusted, world_size)
    if pruning.processes.rank == 0:
        x, y = test[:]
        accuracy = (model(x).argmax(1) == y).float().mean().item()
        suspects = pruning.suspects(dataset.tensors[1], top=200)["index"]
        print(f"accuracy {accuracy:.1%} with {1 - sum(pruning.sizes) / pruning.n / EPOCHS:.0%} of the training saved")
        print(f"{wrong[suspects].sum()} of the 200 most suspect labels are wrong, and {wrong.mean():.0%} of all")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
