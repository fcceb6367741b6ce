"""Label noise: exact rates, uniform choices, fixed maps, and the human labels of CIFAR-N."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from alignprune_exp.data.noise import asymmetric, asymmetric_map, human_labels, symmetric
from alignprune_exp.errors import UsageError

DATA = Path(os.environ.get("ALIGNPRUNE_DATA") or Path(__file__).parents[2] / "shared/data")
CHANCE = 1e-4  # of a statistical test rejecting the truth; the seeds are fixed, so it fails always or never


def _clean(n: int, n_classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n_classes, n)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(2, 12), st.floats(0, 1), st.integers(0, 99))
def test_symmetric_moves_exactly_the_rate_to_other_classes(n, n_classes, rate, seed):
    clean = _clean(n, n_classes)
    before = clean.copy()
    labels = symmetric(clean, n_classes, rate, np.random.default_rng(seed))
    assert (labels != clean).sum() == round(rate * n)
    assert labels.dtype == np.int64
    assert labels.min() >= 0
    assert labels.max() < n_classes
    np.testing.assert_array_equal(clean, before)


def test_symmetric_is_uniform_over_samples_and_over_wrong_classes():
    clean, n_classes = _clean(100, 10), 10
    moved, into = np.zeros(100), np.zeros((n_classes, n_classes))
    for seed in range(400):
        labels = symmetric(clean, n_classes, 0.5, np.random.default_rng(seed))
        moved += labels != clean
        np.add.at(into, (clean, labels), labels != clean)
    # Draws without replacement vary less than a multinomial, so this side can only be too lenient downwards.
    assert chisquare(moved).pvalue > CHANCE
    for c in range(n_classes):
        assert into[c, c] == 0
        assert chisquare(np.delete(into[c], c)).pvalue > CHANCE


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(2, 12), st.floats(0, 1), st.data())
def test_asymmetric_moves_the_rate_of_every_class_with_a_target(n, n_classes, rate, data):
    clean = _clean(n, n_classes)
    target = np.array(
        [data.draw(st.sampled_from([-1, *(k for k in range(n_classes) if k != c)])) for c in range(n_classes)]
    )
    labels = asymmetric(clean, target, rate, np.random.default_rng(1))
    for c in range(n_classes):
        moved = labels[clean == c] != c
        assert moved.sum() == (round(rate * len(moved)) if target[c] >= 0 else 0)
        assert set(labels[clean == c][moved]) <= {target[c]}


def test_noise_repeats_with_its_generator_and_changes_with_the_seed():
    clean = _clean(500, 10)
    a, b, c = (symmetric(clean, 10, 0.4, np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_asymmetric_map_prefers_the_fixed_map_then_superclasses_then_the_next_class():
    superclass = np.array([7, 3, 7, 7, 3, 5, -1])
    assert asymmetric_map(4, None, {0: 2, 2: 0}).tolist() == [2, -1, 0, -1]
    assert asymmetric_map(7, superclass, None).tolist() == [2, 4, 3, 0, 1, -1, -1]
    assert asymmetric_map(4, None, None).tolist() == [1, 2, 3, 0]
    assert asymmetric_map(7, superclass, {0: 1}).tolist() == [1] + 6 * [-1]


def _write(path: Path, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(arrays, path)
    return path


@pytest.fixture
def clean10():
    return _clean(200, 10)


def test_human_labels_are_read_and_found_nearby(tmp_path, clean10):
    worse = _clean(200, 10, seed=9)
    file = _write(tmp_path / "cifar_n/CIFAR-10_human.pt", clean_label=clean10, worse_label=worse)
    root = tmp_path / "cifar10"
    root.mkdir()
    for found in (
        human_labels(file, None, "cifar10", "worst", clean10),
        human_labels(None, root, "cifar10", "worst", clean10),
        human_labels(None, root / "deeper", "cifar10", "worst", clean10),
    ):
        np.testing.assert_array_equal(found, worse)


def test_human_labels_of_other_images_are_refused_with_count_and_place(tmp_path, clean10):
    wrong = clean10.copy()
    wrong[[17, 90]] = (wrong[[17, 90]] + 1) % 10
    file = _write(tmp_path / "x.pt", clean_label=wrong, worse_label=clean10)
    with pytest.raises(UsageError, match=r"differ .* in 2 places, first at index 17"):
        human_labels(file, None, "cifar10", "worst", clean10)
    with pytest.raises(UsageError, match=r"labels 200 images where the training set has 150"):
        human_labels(file, None, "cifar10", "worst", clean10[:150])


class _Malice:
    def __reduce__(self):
        return (os.mkdir, (self.target,))

    def __init__(self, target: str) -> None:
        self.target = target


def test_human_labels_never_run_what_a_pickle_says(tmp_path, clean10):
    torch.save({"clean_label": _Malice(str(tmp_path / "owned"))}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="cannot be read as a label file"):
        human_labels(tmp_path / "x.pt", None, "cifar10", "worst", clean10)
    (tmp_path / "y.pt").write_bytes(pickle.dumps(_Malice(str(tmp_path / "owned"))))
    with pytest.raises(UsageError, match="cannot be read as a label file"):
        human_labels(tmp_path / "y.pt", None, "cifar10", "worst", clean10)
    assert not (tmp_path / "owned").exists()


def test_human_label_mistakes_say_what_to_type(tmp_path, clean10):
    with pytest.raises(UsageError, match=r"digits has none of: use dataset=cifar10 or cifar100"):
        human_labels(None, None, "digits", "worst", clean10)
    with pytest.raises(UsageError, match=r"noise.labels=best .* aggre, rand1, rand2, rand3, worst"):
        human_labels(None, None, "cifar10", "best", clean10)
    with pytest.raises(UsageError, match=r"CIFAR-10_human.pt was not found .*noise.file=.*noisylabels.com"):
        human_labels(None, tmp_path, "cifar10", "worst", clean10)
    with pytest.raises(UsageError, match=r"gone.pt is no file"):
        human_labels(tmp_path / "gone.pt", None, "cifar10", "worst", clean10)
    file = _write(tmp_path / "a.pt", clean_label=clean10, noisy_label=clean10)
    with pytest.raises(UsageError, match=r"holds clean_label, noisy_label where clean_label, worse_label"):
        human_labels(file, None, "cifar10", "worst", clean10)
    file = _write(tmp_path / "b.pt", clean_label=clean10, worse_label=clean10 + 5)
    with pytest.raises(UsageError, match=r"worse_label .* not a list of class numbers from 0 to 9"):
        human_labels(file, None, "cifar10", "worst", clean10)


@pytest.mark.parametrize(
    "text", ["airplane\n", "http://www.noisylabels.com", "hello", "index,label\n0,1\n", '{"worse_label": [1]}', ""]
)
def test_a_text_is_no_file_of_human_labels(tmp_path, clean10, text):
    (tmp_path / "x.pt").write_text(text)
    with pytest.raises(UsageError, match=r"x.pt cannot be read as a label file of CIFAR-N \(\w+\): fetch it again"):
        human_labels(tmp_path / "x.pt", None, "cifar10", "worst", clean10)


NO_LISTS = {
    "ragged": [[1], [1, 2]],
    "empty": [],
    "number": 3,
    "text": "airplane",
    "bfloat16": torch.zeros(200, dtype=torch.bfloat16),
    "bool": torch.zeros(200, dtype=torch.bool),
    "gradient": torch.zeros(200, requires_grad=True),
    "column": torch.zeros(200, 1, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", NO_LISTS)
@pytest.mark.parametrize("key", ["clean_label", "worse_label"])
def test_what_is_no_list_of_class_numbers_is_named(tmp_path, clean10, key, kind):
    file = _write(tmp_path / "x.pt", **{"clean_label": clean10, "worse_label": clean10} | {key: NO_LISTS[kind]})
    with pytest.raises(UsageError, match=rf"^{key} in .*x.pt is not a list of class numbers from 0 to 9: type noise"):
        human_labels(file, None, "cifar10", "worst", clean10)
    file = _write(tmp_path / "y.pt", **{"clean_label": clean10, "worse_label": clean10} | {key: clean10[:40]})
    with pytest.raises(UsageError, match=r"y.pt labels 40 images where the training set has 200: noise=real needs"):
        human_labels(file, None, "cifar10", "worst", clean10)


@pytest.mark.skipif(not (DATA / "cifar_n").is_dir(), reason=f"no CIFAR-N label files in {DATA}/cifar_n")
@pytest.mark.parametrize(
    ("dataset", "labels", "percent"),
    [
        ("cifar10", "aggre", 9.01),
        ("cifar10", "rand1", 17.23),
        ("cifar10", "rand2", 18.12),
        ("cifar10", "rand3", 17.64),
        ("cifar10", "worst", 40.21),
        ("cifar100", "", 40.20),
    ],
)
def test_human_noise_rates_are_the_published_ones(dataset, labels, percent):
    import pyarrow.parquet as pq

    column = {"cifar10": "label", "cifar100": "fine_label"}[dataset]
    table = pq.read_table(DATA / dataset / "train.parquet", columns=[column])
    clean = table.column(column).to_numpy()
    noisy = human_labels(None, DATA / dataset, dataset, labels, clean)
    assert len(noisy) == 50_000
    assert round(100 * float((noisy != clean).mean()), 2) == percent
