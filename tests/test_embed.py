"""Features of a data set's images by a network: in the order of the images, and as the network itself has them."""

from itertools import product
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from alignprune_exp import embed
from alignprune_exp.data.sources.digits import Digits
from alignprune_exp.run import Run
from harness import Stop, checkpoint_of, config_of, contents, only_run, rows_of, sentence_of, trained

LINE = ("keep_checkpoints=true", "method=full", "noise=clean", "precision=fp32")
DIGITS = Digits(name="digits").open().train


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Where a run of digits has left its network."""
    place = tmp_path_factory.mktemp("kept")
    trained(Run(config_of(place, *LINE)))
    return place


@pytest.fixture
def mistaken(tmp_path, capsys):
    """Type a command that is a mistake; return the one sentence that it gets, with no file written."""

    def typed(*line):
        before = contents(tmp_path)
        capsys.readouterr()
        assert embed.main([*map(str, line), "-o", str(tmp_path / "features.npy")]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert contents(tmp_path) == before
        return sentence_of(said.err)

    return typed


def pixels():
    """Anyone's network: the pixels themselves."""
    return nn.Flatten()


def flat():
    return nn.Flatten(0)


def infinite():
    return nn.Sequential(nn.Flatten(), nn.Threshold(2.0, torch.inf))


def unfit():
    return nn.Conv2d(3, 1, 1)


def no_network():
    return 3


def broken():
    raise LookupError("no weights here")


def test_anyones_features_have_the_order_of_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "AT_ONCE", 500)
    out = tmp_path / "f.npy"
    assert embed.main([f"{__name__}.pixels", "-o", str(out), "dataset=digits", "dataset.subset=100"]) == 0
    everything = DIGITS.pixels(np.arange(len(DIGITS))).flatten(1).numpy() / np.float32(255)
    np.testing.assert_allclose(np.load(out), everything, rtol=1e-6)


def test_a_runs_features_are_what_its_last_layer_is_given(results, tmp_path):
    folder, out = only_run(results), tmp_path / "f.npy"
    assert embed.main([str(folder), "-o", str(out)]) == 0
    found = np.load(out, allow_pickle=False)
    assert found.shape[0] == len(DIGITS)
    assert found.dtype == np.float32
    one = Run(config_of(results, *LINE))
    one.loop.network.learner.load_state_dict(checkpoint_of(folder)["model"])
    network = one.loop.network.learner.networks[0].eval()
    images = DIGITS.pixels(np.arange(len(DIGITS))).float() / 255
    data = one.setup.task.data
    images = (images - torch.tensor(data.mean).view(-1, 1, 1)) / torch.tensor(data.std).view(-1, 1, 1)
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        logits = network(images.float())
        torch.testing.assert_close(last(torch.from_numpy(found)), logits, rtol=1e-4, atol=1e-4)
    assert (logits.argmax(1).numpy() == DIGITS.labels).mean() > 0.6  # it is the network that was trained


def test_it_is_said_of_what_features_are_and_whether_labels_of_the_same_images_have_shaped_them(
    results, tmp_path, capsys
):
    run = only_run(results)
    own, other = tmp_path / "own.npy", tmp_path / "other.npy"
    assert embed.main([str(run), "-o", str(own), "dataset=digits"]) == 0
    note, said = capsys.readouterr().out.splitlines()
    assert note.startswith(
        f"note: {run.name} was trained on labels of digits itself, and features that have learned wr"
    )
    assert said == f"{own}: 128 features of the 1,438 training images of digits; use score.file= or learner.file={own}"
    assert embed.main([f"{__name__}.pixels", "-o", str(other), "dataset=digits"]) == 0
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{other}: 64 features of the 1,438 training images of digits; use score.file=")


def test_a_run_goes_by_the_features_of_another(results, tmp_path):
    out = tmp_path / "f.npy"
    assert embed.main([only_run(results).name, "--results", str(results), "-o", str(out), "dataset=digits"]) == 0
    line = ("method=sieve_features", "noise=sym0.5", f"score.file={out}", "dataset.subset=null")
    first, *_ = rows_of(trained(Run(config_of(tmp_path, *line))))
    assert first["auroc_features"] > 0.95


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        ("nowhere", "there is no run nowhere; give a run's folder"),
        ("dino", "under results/runs; of a network of your own give package.module.function"),
        ("no_such.module", "no_such.module cannot be called (ModuleNotFoundError: No module named 'no_such'); name a"),
        (f"{__name__}.absent", "cannot be called (AttributeError"),
        (f"{__name__}.broken", "cannot be called (LookupError: no weights here)"),
        (f"{__name__}.no_network", "returns int; let it return a torch.nn.Module"),
        (f"{__name__}.unfit", "the network does not take these images: "),
        (f"{__name__}.flat", "the network returns (92032,) of 1438 images; let it return (B, d)"),
        (f"{__name__}.infinite", "the network's features of images 0 to 1437 are not all finite"),
    ],
)
def test_what_makes_no_features_is_refused(mistaken, network, sentence):
    assert sentence in mistaken(network, "dataset=digits")


def test_settings_are_those_of_training(mistaken):
    for line, sentence in {
        "dataset=digit": "dataset=digit is unknown (did you mean digits?)",
        "dataset=digits_boxes": "is unknown",
        "dataset=digit_boxes": "is not of images with class labels",
        "dataset.subste=3": "subste",
        "dataset=cifar10 paths.data=nowhere": "nowhere",
        "suite=features": "suite=features is a grid of runs; give the one data set, as in dataset=cifar10",
    }.items():
        assert sentence in mistaken(f"{__name__}.pixels", *line.split())


def test_a_run_without_its_network_or_for_other_images_is_refused(results, tmp_path, mistaken):
    bare = trained(Run(config_of(tmp_path, "method=full", "noise=clean")))
    assert "keeps no network; train it again with force=true keep_checkpoints=true" in mistaken(bare)
    for name in "ab":
        for split in ("train", "test"):
            place = tmp_path / "photographs" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                Image.new("RGB", (8, 8), (40 * number, 9, 9)).save(place / f"{number}.png")
    photographs = ("dataset=image_folder", f"dataset.root={tmp_path}/photographs", "dataset.image_size=8")
    sentence = "the network takes images of 1 channels, and these have 3"
    assert sentence in mistaken(only_run(results), *photographs)


def test_a_network_from_before_the_end_of_its_run_is_refused(tmp_path, mistaken):
    assert Stop().run(config_of(tmp_path, "method=full", "noise=clean"), 10)
    sentence = mistaken(only_run(tmp_path))
    assert " keeps the network of epoch " in sentence
    assert " of 12 alone; let the run end" in sentence


def test_a_run_that_was_moved_is_said_to_be(results, tmp_path, mistaken):
    folder = only_run(results)
    for elsewhere in ("runs/mine", f"best/{folder.name}"):
        copytree(folder, tmp_path / elsewhere)
        assert f"is not runs/{folder.name}, which its config and data make it" in mistaken(tmp_path / elsewhere)


def test_a_run_whose_data_are_gone_says_whose_they_are(tmp_path, mistaken):
    for split, name, number in product(("train", "test"), "ab", range(6)):
        place = tmp_path / "photographs" / split / name
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 9, 9)).save(place / f"{number}.png")
    photographs = ("dataset=image_folder", f"dataset.root={tmp_path}/photographs", "dataset.image_size=8")
    line = (*photographs, "dataset.crop=0", "method=full", "noise=clean", "reference=none", "keep_checkpoints=true")
    folder = trained(Run(config_of(tmp_path, *line, base=("threads=1", "epochs=1"))))
    (tmp_path / "photographs").rename(tmp_path / "elsewhere")
    sentence = mistaken(folder, "dataset=digits")
    assert sentence.startswith(f"{folder} cannot be set up as it was trained, with its own data")
    assert "photographs is not a folder" in sentence


def test_what_is_typed_of_the_machine_counts(tmp_path, mistaken):
    before = torch.get_num_threads()
    try:
        assert embed.main([f"{__name__}.pixels", "-o", str(tmp_path / "f.npy"), "threads=3"]) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert "threads=1024 is far beyond" in mistaken(f"{__name__}.pixels", "threads=1024")


def test_a_file_that_is_there_stays(tmp_path, capsys):
    out = tmp_path / "f.npy"
    out.write_bytes(b"mine")
    line = [f"{__name__}.pixels", "-o", str(out), "dataset=digits"]
    assert embed.main(line) == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert embed.main([*line, "--force"]) == 0
    assert len(np.load(out)) == len(DIGITS)


def test_features_are_of_float32_on_every_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    embed._anyones("torch.nn.Identity", config_of(tmp_path))
    assert torch.backends.cudnn.allow_tf32 is False
