"""Records of runs that never ran, whole and consistent, with numbers known beforehand."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa

from alignprune_exp.records import write_parquet

HOST = "stromboli-host-17"
SECRET = "/home/somebody/secret"
SAMPLES = 100


def write_record(results, id, config_id, accuracy, seed=0, epochs=2, **changes):
    """Write the record of a finished run; ``changes`` are to its summary, whose ``saved`` is a multiple of 0.005."""
    folder = results / "runs" / id
    folder.mkdir(parents=True)
    summary = {
        "id": id,
        "config_id": config_id,
        "status": "finished",
        "dataset": "digits",
        "noise": "sym",
        "noise_rate": 0.5,
        "pairing": None,
        "pruner": "infobatch",
        "score": "das",
        "window": 3,
        "seed": seed,
        "scale": "smoke",
        "epochs": epochs,
        "samples": SAMPLES,
        "test_accuracy_final": accuracy,
        "test_accuracy_best": accuracy + 3,
        "saved": 0.25,
        "kept_noise_mean": 0.4,
        "kept_noise_weighted_mean": 0.5,
        "detection_auroc_last": 0.7,
        "seconds_train": 4.0 * epochs,
        "seconds_total": 6.0 * epochs,
        "samples_per_second": 1000.0,
        "commit": "c" * 40,
        "finished_at": "2026-01-01T00:00:00+00:00",
    } | changes
    environment = {
        "config_id": config_id,
        "epochs": epochs,
        "platform": f"Linux-6.1-{HOST}-x86_64",
        "precision": "fp32",
        "host": HOST,
        "commit": "c" * 40,
        "command": f"python -m alignprune_exp.train paths.data={SECRET} dataset.root={SECRET} seed={seed} "
        f"'paths.results={SECRET} x' noise.file=~/n.pt tracking.entity=somebody",
        "data_fingerprint": "f" * 64,
    }
    trained = round(SAMPLES * epochs * (1 - summary["saved"]))
    rows = [_row(epoch, epochs, accuracy, trained) for epoch in range(epochs)]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"dataset: {{name: cifar10, root: {SECRET}, subset: null, test_subset: null, flip: false, crop: 0, "
        f"download: false}}\nnoise: {{name: sym, file: {SECRET}/n.pt}}\n"
        f"tracking: {{name: wandb, entity: somebody}}\npaths: {{results: {SECRET}, data: {SECRET}}}\nseed: {seed}\n"
    )
    write_parquet(folder / "dynamics.parquet", pa.Table.from_pylist(_dynamics(epochs)))
    write_samples(folder, _samples(trained))
    return folder


def write_samples(folder, frame, classes=10):
    write_parquet(folder / "samples.parquet", pa.Table.from_pandas(frame, preserve_index=False), classes=classes)


def edit_json(path, **changes):
    """Change keys of a JSON file; ``...`` removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_rows(folder, change):
    """Replace the rows of metrics.jsonl by what ``change`` makes of the list of them."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def _row(epoch, epochs, accuracy, trained):
    return {
        "epoch": epoch,
        "ranked_by": "das" if epoch else None,
        "train_loss": 2.0 - epoch / 10,
        "test_accuracy": accuracy if epoch == epochs - 1 else accuracy + 3,
        "test_loss": 2.5,
        "lr": 0.1,
        "kept_fraction": 0.75,
        "kept_noise": 0.4,
        "kept_noise_weighted": 0.5,
        "auroc_das": round(0.7 - (epochs - 1 - epoch) / 10, 3),
        "auroc_loss": 0.1,
        "reference_loss": 2.2,
        "score_mean": -0.1,
        "low_fraction": None,
        "samples_seen": trained * (epoch + 1) // epochs,
        "seconds": 6.0,
        "seconds_select": 0.1,
        "seconds_train": 3.5,
        "seconds_refresh": 0.0,
        "seconds_reference": 0.1,
        "seconds_score": 0.2,
        "seconds_test": 2.0,
    }


def _dynamics(epochs):
    return [
        {"epoch": epoch, "kind": kind, "name": name, "group": group, "x": x, "value": 1.0 + x + epoch}
        for epoch in range(epochs)
        for group in ("clean", "noisy")
        for kind, name in (("loss_quantile", "loss"), ("histogram", "das"))
        for x in (0.25, 0.5, 0.75)
    ]


def _samples(trained):
    each, more = divmod(trained, SAMPLES)
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "index": np.arange(SAMPLES) * 3,
            "path": [f"{SECRET}/{number}.png" for number in range(SAMPLES)],
            "label": np.arange(SAMPLES) % 10,
            "clean_label": np.arange(SAMPLES) // 2 % 10,
            "predicted": np.arange(SAMPLES) % 7,
            "loss": rng.random(SAMPLES, np.float32),
            "score_loss": rng.random(SAMPLES, np.float32),
            "score_das": np.full(SAMPLES, np.nan, np.float32),
            "score_small_loss": -rng.random(SAMPLES, np.float32),
            "score_settled": -rng.random(SAMPLES, np.float32),
            "times_selected": np.full(SAMPLES, each) + (np.arange(SAMPLES) < more),
        }
    )
