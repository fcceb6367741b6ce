"""Features that no label has had a say in, and what ranks by them."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from alignprune_exp.data import features as module_of_files
from alignprune_exp.data.features import check_foretells
from alignprune_exp.errors import UsageError
from alignprune_exp.pruning import DynamicPruning, within_class
from alignprune_exp.pruning import patches as module
from alignprune_exp.pruning.patches import Patches
from alignprune_exp.pruning.readout import WEAK, readout
from alignprune_exp.pruning.scores import Features
from alignprune_exp.pruning.transition import transition
from alignprune_exp.run import Run
from harness import SMALL, config_of, rows_of, same_bits_when_stopped, summary_of, trained

LINE = ("method=sieve_features", "noise=sym0.5", "pruner.exclude=0.3")


def made(images, mirrored=False, seed=0):
    return Patches(images, mirrored, np.random.default_rng(seed))


def plainly(images, mirrored, seed):
    """The features (n, K) of the images that the patches are from, patch by patch, in double precision."""
    x, rng = images.double().numpy(), np.random.default_rng(seed)
    n, _, height, width = x.shape
    h, w = min(module.PATCH, height), min(module.PATCH, width)
    image, top, left = (rng.integers(bound, size=module.DRAWN) for bound in (n, height - h + 1, width - w + 1))

    def taken(patch):
        patch = patch.ravel() - patch.mean()
        return patch / np.sqrt(np.square(patch).mean() + module.FLOOR)

    drawn = np.stack([taken(x[i, :, y : y + h, z : z + w]) for i, y, z in zip(image, top, left, strict=True)])
    mean = drawn.mean(0)
    u, s, _ = np.linalg.svd(np.cov(drawn.T), hermitian=True)
    whiten = u @ np.diag(1 / np.sqrt(s + module.SMOOTH)) @ u.T
    filters = (drawn[: module.FILTERS] - mean) @ whiten
    filters /= np.maximum(np.linalg.norm(filters, axis=1, keepdims=True), 1e-12)

    def features(one):
        rows, columns = (range(0, side - length + 1, module.STRIDE) for side, length in ((height, h), (width, w)))
        response = np.array(
            [[filters @ whiten @ (taken(one[:, y : y + h, z : z + w]) - mean) for z in columns] for y in rows]
        )
        shrunk = np.sign(response) * np.maximum(np.abs(response) - module.THRESHOLD, 0)
        cells = [
            [part[a0:a1, b0:b1].mean((0, 1)) for a0, a1 in halves(len(rows)) for b0, b1 in halves(len(columns))]
            for part in (shrunk, np.abs(shrunk))
        ]
        return np.concatenate([np.stack(cell, 1) for cell in cells]).ravel()

    raw = np.stack([features(one) for one in x])
    if mirrored:
        raw = (raw + np.stack([features(one[:, :, ::-1]) for one in x])) / 2
    spread = raw.std(0)
    return (raw - raw.mean(0)) / np.where(spread > 0, spread, 1)


def halves(length):
    return [(0, -(-length // 2)), (length // 2, length)]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(7, 14),
    st.integers(7, 14),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([1, 40]),
)
def test_features_are_the_mean_responses_to_whitened_patches(channels, height, width, mirrored, seed, scale):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.normal(2.0, scale, (6, channels, height, width)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FILTERS", 5)
        patch.setattr(module, "DRAWN", 300)
        patch.setattr(module, "AT_ONCE", 4)
        found = made(images, mirrored, seed)(images)
        expected = plainly(images, mirrored, seed)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@given(st.booleans(), st.integers(0, 99))
def test_an_image_has_its_features_whatever_others_come_with_it(mirrored, seed):
    images = torch.rand(9, 3, 12, 10, generator=torch.Generator().manual_seed(seed))
    features = made(images, mirrored)
    together = features(images)
    assert together.shape == (9, 2 * 4 * module.FILTERS)
    torch.testing.assert_close(torch.cat([features(images[:4]), features(images[4:])]), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features(3 * images + 7).shape, together.shape)


def test_mirror_images_are_alike_where_they_mean_the_same():
    images = torch.rand(20, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    alike, apart = made(images, mirrored=True), made(images)
    torch.testing.assert_close(alike(images.flip(3)), alike(images), rtol=1e-4, atol=1e-4)
    assert (apart(images.flip(3)) - apart(images)).abs().max() > 0.5


def test_large_images_are_averaged_down_and_small_ones_taken_as_they_are():
    images = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    large = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(made(large)(large), made(images)(images), rtol=1e-3, atol=1e-3)
    tiny = images[:, :, :3, :5]
    assert made(tiny)(tiny).isfinite().all()


def test_images_of_one_colour_have_no_features():
    assert (made(torch.full((4, 3, 9, 9), 5.0))(torch.full((4, 3, 9, 9), 5.0)) == 0).all()


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.rand(3, 8, 8), "images are float32 of shape .3, 8, 8.; pass floating point of shape"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "images are uint8 of shape"),
        (torch.zeros(0, 1, 8, 8), "images are float32 of shape .0, 1, 8, 8."),
        (torch.full((2, 1, 8, 8), torch.nan), "the images are not finite"),
    ],
)
def test_what_has_no_patches_is_refused(images, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(images)


# ---- the score --------------------------------------------------------------------------------------------


@given(st.integers(8, 30), st.integers(0, 99))
def test_features_rank_alone_at_first_and_losses_gain_on_them(n, seed):
    rng = np.random.default_rng(seed)
    labels, margins = np.arange(n) % 2, rng.normal(size=n).astype(np.float32)
    pruning = DynamicPruning(range(n), 8, "topk", "features", labels=labels, ratio=0.5, warmup=0, seed=seed)
    assert pruning.due
    pruning.tell(margins)
    foretold, seen = within_class(margins, labels), np.zeros(n)
    for _ in range(8):
        losses = np.nan_to_num(pruning.scores("cleaning"))
        np.testing.assert_allclose(pruning.ranking, min(1, seen.mean() / 4) * losses + foretold, rtol=1e-4, atol=1e-5)
        assert not pruning.due
        index = torch.from_numpy(pruning.order())
        seen[index] += 1
        pruning.update(index, torch.from_numpy(rng.exponential(size=len(index)).astype(np.float32)))
        pruning.end_epoch()


def test_features_that_were_not_told_are_asked_for():
    pruning = DynamicPruning(range(4), 8, "sieve", "features", labels=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="score='features' goes by what you tell of every sample before training"):
        next(iter(pruning.sampler))


# ---- runs -------------------------------------------------------------------------------------------------


def test_a_run_knows_wrong_labels_before_it_has_trained(tmp_path):
    one = Run(
        config_of(tmp_path, "pruner=topk", "pruner.warmup=0", "score=features", "noise=sym0.5", "dataset.subset=null")
    )
    train = one.setup.task.data.train
    one.loop._foretell()
    assert roc_auc_score(train.wrong, -one.loop.pruning.told.numpy()) > 0.95
    assert train.wrong[one.loop.pruning.selection.indices].mean() < train.wrong.mean() - 0.1


def embedded(one, seed):
    """Features (n, 40) of all training images of a run's data set: random projections, which say something of them."""
    images, rng = one.setup.task.data.train.source, np.random.default_rng(seed)
    pixels = images.pixels(np.arange(len(images))).flatten(1).numpy() / 255
    return (pixels @ rng.normal(size=(pixels.shape[1], 40))).astype(np.float32)


def test_a_run_goes_by_the_file_it_is_given(tmp_path):
    path = tmp_path / "given" / "of everything.npy"
    path.parent.mkdir()
    given_ = embedded(Run(config_of(tmp_path)), 0)
    np.save(path, given_)
    one = Run(config_of(tmp_path, *LINE, f"score.file='{path}'"))
    one.loop._foretell()
    train = one.setup.task.data.train
    expected = readout(torch.from_numpy(given_[train.rows]), torch.from_numpy(train.labels), WEAK).margins
    assert torch.equal(one.loop.pruning.told, expected)


def test_a_run_is_what_is_in_its_file_of_features(tmp_path):
    plain = Run(config_of(tmp_path))
    for name, seed in {"a.npy": 0, "b.npy": 0, "c.npy": 1}.items():
        np.save(tmp_path / name, embedded(plain, seed))
    a, b, c = (Run(config_of(tmp_path, *LINE, f"score.file={tmp_path / name}.npy")).setup.id for name in "abc")
    assert a == b != c


def test_a_pass_for_features_is_counted_in_the_first_epoch(undisturbed):
    folder = undisturbed(*LINE)
    n, rows = summary_of(folder)["samples"], rows_of(folder)
    assert [row["samples_refreshed"] for row in rows] == [n, *[0] * (len(rows) - 1)]
    assert {row["ranked_by"] for row in rows} == {None, "features"}


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path):
    same_bits_when_stopped(tmp_path, 3, *LINE, base=SMALL)


def test_a_run_ranks_by_features_in_every_pruner(tmp_path):
    folder = trained(Run(config_of(tmp_path, "pruner=infobatch", "score=features", "noise=sym0.5")))
    assert {row["ranked_by"] for row in rows_of(folder)} <= {None, "features"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read (No such file or directory); write it by alignprune embed or numpy.save, one row"),
        ("a folder", "cannot be read (Is a directory); write it by alignprune embed or numpy.save"),
        (b"no array", "cannot be read (it is no array of numbers as NumPy writes them); write it by alignprune embed"),
        (np.zeros(4), "has float64 of shape (4,); write numbers (n, d)"),
        (np.zeros((4, 2)), "has 4 rows; write one row for each of the data set's 1,438 training samples, in its order"),
        (np.full((1438, 2), np.nan), "is not finite, as float32, in row"),
        (np.full((1438, 2), 1e300), "is not finite, as float32, in row"),
        (np.array([["a"]] * 1438), "has <U1 of shape"),
        (np.array([[{}]] * 1438), "cannot be read (it is no array of numbers"),
    ],
)
def test_a_file_that_cannot_be_it_is_refused(refused, tmp_path, content, sentence):
    path = tmp_path / "features.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.mkdir()
    elif content is not None:
        np.save(path, content)
    assert f"score.file={path} {sentence}" in refused("method=sieve_features", f"score.file={path}")


@pytest.mark.parametrize("line", [("method=sieve_features", "score.file"), ("learner=posterior", "learner.file")])
def test_a_sweep_looks_at_each_file_of_features_before_its_first_run(refused, tmp_path, line):
    chosen, key = line
    np.save(tmp_path / "own.npy", embedded(Run(config_of(tmp_path)), 0))
    files = f"{key}=choice('{tmp_path}/own.npy','{tmp_path}/none.npy')"
    sentence = refused("-m", chosen, "noise=clean", files, f"paths.results={tmp_path}")
    assert sentence.startswith(f"{key}={tmp_path}/none.npy cannot be read")


@pytest.mark.parametrize("noise", ["clean", "sym0.5", "sym0.8"])
def test_features_of_other_images_are_refused_and_their_own_are_not(refused, tmp_path, noise):
    own = embedded(Run(config_of(tmp_path)), 0)
    np.save(tmp_path / "own.npy", own)
    line = ("method=sieve_features", f"noise={noise}", "dataset.subset=null")
    task = Run(config_of(tmp_path, *line, f"score.file={tmp_path}/own.npy")).setup.task
    assert torch.equal(task.features(torch.arange(task.n)), torch.from_numpy(own[task.data.train.rows]))
    for seed in range(3):
        np.save(tmp_path / "other.npy", np.random.default_rng(seed).permutation(own))
        sentence = refused(*line, f"score.file={tmp_path}/other.npy")
        assert "foretells the labels no better than shuffled ones: its rows are in another order than" in sentence


class Late(Features):
    """Somebody's own, told in the second epoch."""

    told_first = False

    def due(self, epoch, epochs):
        return epoch == 1


def test_a_score_of_ones_own_is_told_of_features_when_it_is_due(tmp_path):
    line = ("method=sieve_features", "score.name=test_features.Late", "pruner.warmup=3", "pruner.exclude=0.3")
    one = Run(config_of(tmp_path, *line, "learner=posterior"))
    looked = [one.loop.epoch(threading.Event(), None).refreshed for _ in range(3)]
    assert looked == [one.setup.n, one.setup.n, 0]
    features = one.setup.task.features(torch.arange(one.setup.n))
    expected = readout(features, torch.from_numpy(one.setup.task.strata), WEAK).margins
    assert torch.equal(one.loop.pruning.told, expected)


def test_a_learner_goes_by_a_file_of_its_own_which_a_score_beside_it_has_to_share(refused, tmp_path):
    own = embedded(Run(config_of(tmp_path)), 0)
    np.save(tmp_path / "own.npy", own)
    line = ("learner=posterior", f"learner.file={tmp_path}/own.npy", "noise=sym0.5", "dataset.subset=null")
    alone = Run(config_of(tmp_path, "pruner=full", *line))
    alone.loop._foretell()
    task = alone.setup.task
    features = torch.from_numpy(own[task.data.train.rows])
    expected = transition(features, torch.from_numpy(task.strata), WEAK).classes
    assert torch.equal(alone.loop.network.learner.target_NC, expected)
    two = f"learner.file={tmp_path}/own.npy and score.file=null are two, and a run"
    assert two in refused("method=sieve_features", *line)
    both = Run(config_of(tmp_path, "method=sieve_features", *line, f"score.file={tmp_path}/own.npy"))
    both.loop._foretell()
    assert torch.equal(both.loop.network.learner.target_NC, expected)
    assert torch.equal(both.loop.pruning.told, readout(features, torch.from_numpy(task.strata), WEAK).margins)
    np.save(tmp_path / "other.npy", np.random.default_rng(0).permutation(own))
    other = tuple(word.replace("own", "other") for word in line)
    assert f"learner.file={tmp_path}/other.npy foretells the labels no better" in refused(*other)
    assert alone.setup.id != Run(config_of(tmp_path, "pruner=full", *line[:1], *line[2:])).setup.id


def few(seed):
    """Features of 300 samples of ten classes, and labels of which half are wrong."""
    rng = np.random.default_rng(seed)
    right = np.repeat(np.arange(10), 30)
    features = rng.normal(size=(300, 64)) + 0.6 * rng.normal(size=(10, 64))[right] * (np.arange(64) < 16)
    return features.astype(np.float32), np.where(rng.random(300) < 0.5, rng.integers(10, size=300), right)


def foretells(features, labels, seed):
    try:
        check_foretells("f.npy", features, labels, np.random.default_rng(seed))
    except UsageError:
        return False
    return True


def test_features_of_few_samples_with_wrong_labels_are_hardly_ever_refused():
    assert sum(foretells(*few(seed), seed) for seed in range(40)) >= 38


def test_features_that_say_nothing_pass_as_seldom_as_is_said():
    def another_order(seed):
        features, labels = few(seed)
        return np.random.default_rng(seed).permutation(features), labels

    assert sum(foretells(*another_order(seed), seed) for seed in range(100)) <= 3  # 1 in 200: above 3 once in 500
    _, labels = few(0)
    for alike in (0.0, 1.0, 3e38):
        assert not foretells(np.full((300, 4), alike, np.float32), labels, 0)


@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([1e-3, 1.0, 1e15]))
def test_what_is_explained_is_what_a_ridge_regression_explains(seed, d, scale):
    rng = np.random.default_rng(seed)
    features, labels = scale * (5 + rng.normal(size=(40, d))).astype(np.float32), np.arange(40) % 3
    x, y = features - features.mean(0, dtype=np.float64), np.eye(3)[labels] - np.eye(3)[labels].mean(0)
    penalty = WEAK * np.square(x).sum(0).mean()
    fitted = Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(x, y)
    found = module_of_files._explained(module_of_files._whitened(torch.from_numpy(features)), labels)
    assert found == pytest.approx((y * (x @ fitted.coef_.T)).sum(), rel=1e-6)


def test_features_need_class_labels(refused):
    assert "score=features needs class labels, and task=regression has none" in refused(
        "method=sieve_features", "task=regression"
    )
