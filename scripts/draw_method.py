"""Draw the method: three samples' loss trajectories beside the reference set's, and what becomes of the samples.

python scripts/draw_method.py [OUT]                                       (default: results/figures/method.png)

They are of the main job on digits at 50 % symmetric noise, after as many epochs as the window and two more: the clean
sample that scores highest, the clean sample of the largest loss that is kept, and of the mislabelled samples that are
left out the one that scores lowest.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np

from alignprune_exp.files import write_atomically
from alignprune_exp.report.figures import Followed, encode, method
from alignprune_exp.run import Run
from benchmarking import config

EPOCHS = 12


def followed() -> tuple[list[Followed], np.ndarray]:
    """Train, and return the three samples and the reference trajectory (N,)."""
    run = Run(config("threads=1", "precision=fp32"))
    loop = run.loop
    assert loop is not None
    for _ in range(EPOCHS):
        loop.epoch(threading.Event(), save=lambda: None)
    pruning, noisy = loop.pruning, run.setup.noisy
    assert noisy is not None
    history, score = pruning.trajectories.history(), pruning.ranking
    losses_WN = np.stack([row.numpy() for row in history.rows])
    kept = np.zeros(pruning.n, bool)
    kept[pruning.selection.indices] = True
    chosen = {
        "clean": np.where(~noisy, score, -np.inf).argmax(),
        "clean, but hard": np.where(~noisy & kept, losses_WN[-1], -np.inf).argmax(),
        "mislabelled": np.where(noisy & ~kept, score, np.inf).argmin(),
    }
    samples = [Followed(what, losses_WN[:, i], float(score[i]), bool(kept[i])) for what, i in chosen.items()]
    return samples, history.reference_W.numpy()


def main(arguments: list[str]) -> None:
    out = Path(arguments[0] if arguments else "results/figures/method.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    image = encode(method(*followed(), EPOCHS), "png")
    write_atomically(out, lambda file: file.write(image))
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
