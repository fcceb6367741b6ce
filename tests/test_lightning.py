"""The plug-in in Lightning's own Trainer."""

import logging
import pickle
import warnings

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy
from pandas.testing import assert_frame_equal
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from alignprune_exp.frameworks.lightning import PruningCallback
from alignprune_exp.pruning import SCORES, DynamicPruning, PruningWarning, within_class
from alignprune_exp.pruning.readout import WEAK, readout

N, EPOCHS, BATCH = 64, 6, 8
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def data(n, seed=0):
    labels = torch.arange(n) % 3
    inputs = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) + labels[:, None]
    return TensorDataset(inputs, labels)


def make(pruner="infobatch", score="das", epochs=EPOCHS, **arguments):
    return DynamicPruning(data(N), epochs, pruner, score, **{"window": 3, "seed": 1, **arguments})


class Module(lightning.LightningModule):
    def __init__(self, pruning):
        super().__init__()
        torch.manual_seed(0)
        self.pruning = pruning
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        self.seen, self.steps, self.modes = [], [], []

    def losses(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y, reduction="none")

    def reference_losses(self, batch):
        self.modes.append(self.net.training)
        return self.losses(batch)

    def on_train_epoch_start(self):
        self.seen.append([])
        self.steps.append(self.trainer.num_training_batches)

    def training_step(self, batch, number):
        index, item = batch
        assert self.net.training
        if self.seen:  # Lightning starts no epoch that it resumes
            self.seen[-1] += index.tolist()
        return self.pruning.update(index, self.losses(item))

    def validation_step(self, batch, number):
        self.losses(batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        schedule = LambdaLR(optimizer, self.pruning.schedule(lambda progress: 1 - progress))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def reference():
    return DataLoader(data(12, seed=1), 5)


def trainer(pruning, *callbacks, **settings):
    settings = {
        "max_epochs": pruning.epochs,
        "reload_dataloaders_every_n_epochs": 1,
        "use_distributed_sampler": False,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_model_summary": False,
        **settings,
    }
    has = any(isinstance(callback, PruningCallback) for callback in callbacks)
    ours = [] if has else [PruningCallback(pruning, reference=reference())]
    return lightning.Trainer(callbacks=[*callbacks, *ours], **settings)


def loader_of(pruning, **options):
    return DataLoader(pruning, BATCH, sampler=pruning.sampler, **options)


def by_hand(pruning, batch=BATCH):
    """The README's loop."""
    module = Module(pruning)
    settings = module.configure_optimizers()
    optimizer, scheduler = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    for _ in range(pruning.epochs):
        module.seen.append([])
        for index, item in DataLoader(pruning, batch, sampler=pruning.sampler):
            module.seen[-1] += index.tolist()
            loss = pruning.update(index, module.losses(item))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        module.eval()
        with torch.no_grad():
            losses = torch.cat([module.losses(batch) for batch in reference()])
        module.train()
        pruning.end_epoch(losses)
    return module


def test_a_reference_loss_that_never_moves_is_said_once():
    pruning = make()
    callback = PruningCallback(pruning, reference=reference(), losses=lambda module, batch: torch.ones(len(batch[1])))
    with pytest.warns(PruningWarning, match="is 0 for every sample .* the reference loss has been 1 in each") as said:
        trainer(pruning, callback).fit(Module(pruning), loader_of(pruning))
    assert sum(warning.category is PruningWarning for warning in said) == 1


def test_lightning_trains_what_the_loop_of_ones_own_does():
    pruning, own = make(), make()
    module = Module(pruning)
    fit = trainer(pruning)
    fit.fit(module, loader_of(pruning))
    expected = by_hand(own)
    assert module.seen == expected.seen
    assert min(map(len, module.seen)) < N
    assert module.steps == [-(-len(seen) // BATCH) for seen in module.seen]
    assert fit.global_step == sum(module.steps)
    assert fit.optimizers[0].param_groups[0]["lr"] == 0
    assert module.modes == [False] * 3 * EPOCHS
    assert_frame_equal(pruning.report(), own.report(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(module.net.state_dict(), expected.net.state_dict())


def test_the_noise_rate_is_learned_from_the_reference_losses():
    pruning, own = (make("sieve", "cleaning", exclude="auto", labels=data(N)[:][1], epochs=12) for _ in range(2))
    module = Module(pruning)
    trainer(pruning).fit(module, loader_of(pruning))
    assert module.seen == by_hand(own).seen
    assert pruning.noise_rate == own.noise_rate > 0


class Bar(TQDMProgressBar):
    totals = ()

    def on_train_epoch_end(self, *arguments):
        super().on_train_epoch_end(*arguments)
        self.totals += ((self.train_progress_bar.n, self.train_progress_bar.total),)


def test_the_progress_bar_has_the_true_number_of_steps():
    pruning, bar = make(), Bar()
    module = Module(pruning)
    trainer(pruning, bar, enable_progress_bar=True).fit(module, loader_of(pruning))
    assert list(bar.totals) == [(steps, steps) for steps in module.steps]


def test_an_epoch_ends_before_its_validation_and_a_trial_run_ends_clean():
    pruning = make()
    module, epochs = Module(pruning), []
    module.on_validation_start = lambda: epochs.append(pruning.epoch)
    fit = trainer(pruning, num_sanity_val_steps=1, limit_train_batches=1.0, accumulate_grad_batches=2)
    fit.fit(module, loader_of(pruning, num_workers=1, persistent_workers=True), DataLoader(make()))
    assert epochs == list(range(EPOCHS + 1))
    assert fit.global_step == sum(-(-steps // 2) for steps in module.steps)
    assert pruning.times_selected.sum() == sum(pruning.sizes)
    quick = make()
    trainer(quick, fast_dev_run=True).fit(Module(quick), loader_of(quick))
    assert quick.epoch == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_resumed_at_any_checkpoint_ends_as_one_that_was_not_interrupted(tmp_path, workers):
    options, pruning = {"num_workers": workers}, make()
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path, "end-{step}", save_top_k=-1, save_on_train_epoch_end=True)
    validated = ModelCheckpoint(tmp_path, "validated-{step}", save_top_k=-1, save_on_train_epoch_end=False, mode="max")
    whole, validation = Module(pruning), loader_of(make())
    trainer(pruning, steps, ends, validated).fit(whole, loader_of(pruning, **options), validation)
    last = np.cumsum(whole.steps)
    assert (np.diff(whole.steps) > 0).any()
    assert (np.diff(whole.steps) < 0).any()
    names = [f"step={step}" for step in (3, *last, last[3] + 2)] + [
        f"{kind}-step={step}" for kind in ("end", "validated") for step in last
    ]
    for path in [tmp_path / f"{name}.ckpt" for name in names[:: 1 + 3 * workers]]:
        resumed = make()
        module = Module(resumed)
        trainer(resumed, ModelCheckpoint(tmp_path / "other")).fit(
            module, loader_of(resumed, **options), validation, ckpt_path=path, weights_only=True
        )
        assert resumed.epoch == EPOCHS, path.name
        assert resumed.report().equals(pruning.report()), path.name
        torch.testing.assert_close(module.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_the_readme_runs(in_the_readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"lightning": lightning, "torch": torch, "F": F, "DataLoader": DataLoader, "DynamicPruning": DynamicPruning}
    given |= {"LambdaLR": LambdaLR, "dataset": data(N), "trusted": data(12, 1), "net": torch.nn.Linear(5, 3)}
    assert in_the_readme("Lightning", given)["pruning"].epoch == 5


# ---- two processes -----------------------------------------------------------------------------------------


def in_two(rank, pruner, score):
    warnings.simplefilter("ignore")
    pruning = make(pruner, score, labels=data(N)[:][1])
    module = Module(pruning)
    fit = trainer(pruning, strategy="ddp", devices=2)
    fit.fit(module, DataLoader(pruning, BATCH // 2, sampler=pruning.sampler))
    assert fit.world_size == dist.get_world_size() == 2
    weights = {key: value.tolist() for key, value in module.net.state_dict().items()}
    return module.seen, pruning.report().to_numpy(), weights, pruning.noise_rate


def test_two_processes_train_as_one_does(together):
    one, two = together(2, in_two, "full", "loss")
    own = make("full", "loss", labels=data(N)[:][1])
    expected = by_hand(own)
    assert one[3] == two[3] == pytest.approx(own.noise_rate, rel=1e-4)
    for epoch, order in enumerate(expected.seen):
        assert [sample for step in zip(one[0][epoch], two[0][epoch], strict=True) for sample in step] == order
    np.testing.assert_array_equal(one[1], two[1])
    np.testing.assert_allclose(one[1], own.report(), rtol=1e-4, atol=1e-5)
    assert one[2] == two[2]
    for key, value in expected.net.state_dict().items():
        np.testing.assert_allclose(one[2][key], value, rtol=1e-4, atol=1e-5)


SHARDS, TENSORS = ({"data_parallel_size": data, "tensor_parallel_size": 2 // data} for data in (2, 1))
ALONE = {"rank": 0, "world_size": 1}


class Parts(Module):
    """A network that is divided, as one of so many processes that take different batches does it."""

    def __init__(self, pruning, different):
        super().__init__(pruning)
        self.different = different

    def configure_model(self):
        if self.different == 1:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        elif self.different:
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def in_parts(rank, folder, strategy, arguments):
    """Train without a break, and on from checkpoints: one within an epoch, and one at the end of one."""
    warnings.simplefilter("ignore")
    found, different = [], strategy["data_parallel_size"]
    for path in (None, folder / "step=11.ckpt", folder / "step=18.ckpt"):
        pruning = make("infobatch", "settled", budget=0.625, **arguments)
        every = ModelCheckpoint(None if path else folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(pruning, *([] if path else [every]), strategy=ModelParallelStrategy(**strategy), devices=2)
        module = Parts(pruning, different)
        loader = DataLoader(pruning, BATCH // different, sampler=pruning.sampler)
        fit.fit(module, loader, ckpt_path=path, weights_only=True)
        found.append((module.seen, pruning.report().to_numpy(), module.net[0].weight.full_tensor().tolist()))
    return found


@pytest.mark.parametrize(("strategy", "arguments"), [(SHARDS, {}), (TENSORS, ALONE)])
def test_a_network_in_parts_learns_what_one_in_one_piece_does(together, tmp_path, strategy, arguments):
    (one, *resumed), (two, *others) = together(2, in_parts, tmp_path, strategy, arguments)
    own, different = make("infobatch", "settled", budget=0.625), strategy["data_parallel_size"]
    expected = by_hand(own)
    for epoch, order in enumerate(expected.seen):
        shares = [one[0][epoch], two[0][epoch]][:different]
        assert [sample for step in zip(*shares, strict=True) for sample in step] == order
    np.testing.assert_allclose(one[1], own.report(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[2], expected.net[0].weight.detach(), rtol=1e-4, atol=1e-5)
    for _, report, weight in (two, *resumed, *others):
        np.testing.assert_array_equal(report, one[1])
        assert weight == one[2]


def tried(rank):
    warnings.simplefilter("ignore")
    pruning = make()
    trainer(pruning, strategy="ddp", devices=2, fast_dev_run=True).fit(Module(pruning), loader_of(pruning))
    return pruning.epoch, int(pruning.times_selected.sum())


def test_a_trial_run_of_two_processes_ends_clean(together):
    assert together(2, tried) == [(1, 2 * BATCH)] * 2


# ---- what a score is told ----------------------------------------------------------------------------------


def test_features_told_before_rank_from_the_first_epoch_on_and_go_on_from_a_checkpoint(tmp_path):
    def told():
        pruning = make("topk", "features", labels=data(N)[:][1], warmup=0, ratio=0.5)
        pruning.tell(readout(*data(N)[:], WEAK))
        return pruning

    pruning, own = told(), told()
    module, expected = Module(pruning), by_hand(own)
    trainer(pruning, ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)).fit(module, loader_of(pruning))
    assert module.seen == expected.seen
    best = within_class(readout(*data(N)[:], WEAK).margins.numpy(), data(N)[:][1].numpy()).argsort()[N // 2 :]
    assert sorted(module.seen[0]) == sorted(best)
    for checkpoint in sorted(tmp_path.glob("*.ckpt"))[::3]:
        again = make("topk", "features", labels=data(N)[:][1], warmup=0, ratio=0.5)  # the state knows what was told
        trainer(again).fit(Module(again), loader_of(again), ckpt_path=checkpoint, weights_only=True)
        assert_frame_equal(again.report(), pruning.report())


@pytest.mark.parametrize("score", ["features", "reducible", "irreducible"])
def test_a_score_that_was_told_nothing_is_one_sentence_before_anything_is_trained(score):
    pruning = make("topk", score, labels=data(N)[:][1])
    with pytest.raises(ValueError, match=f"^score='{score}' goes by what you tell of every sample before training; c"):
        trainer(pruning).fit(Module(pruning), loader_of(pruning))
    assert pruning.running.step == 0


class Telling(lightning.Callback):
    """Tells, in the last step of an epoch, a readout of the network's embeddings."""

    def __init__(self):
        self.epochs = []

    def on_train_batch_end(self, trainer, module, *batch):
        if trainer.is_last_batch and module.pruning.due:
            x, labels = data(N)[:]
            module.pruning.tell(readout(module.net[:2](x).detach(), labels))
            self.epochs.append(module.pruning.epoch)


def test_a_readout_is_told_in_the_last_step_of_an_epoch():
    pruning, telling = make("topk", SCORES["readout"](every=1), labels=data(N)[:][1]), Telling()
    trainer(pruning, telling).fit(Module(pruning), loader_of(pruning))
    assert telling.epochs == list(range(EPOCHS - 1))
    assert pruning.epoch == EPOCHS


# ---- mistakes ----------------------------------------------------------------------------------------------


class Silent(lightning.LightningModule):
    def training_step(self, batch, number): ...
    def configure_optimizers(self): ...


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reload_dataloaders_every_n_epochs": 0}, r"pass Trainer\(reload_dataloaders_every_n_epochs=1\)$"),
        ({"max_epochs": 3}, r"max_epochs=3 is not the pruning's; pass Trainer\(max_epochs=6\)$"),
        ({"limit_train_batches": 1}, "^limit_train_batches=1 would train on less than what is selected; leave it out$"),
        ({"limit_train_batches": 0.5}, "^limit_train_batches=0.5 would train on less"),
        ({"overfit_batches": 0.3}, "^overfit_batches=0.3 would train on less"),
        ({"max_steps": 9}, "^max_steps=9 would train on less"),
        ({"reference": None}, r"score='das' compares with a reference set; pass PruningCallback\(pruning, reference="),
        (
            {"reference": None, "pruner": "sieve"},
            r"^the pruner learns the noise rate from a reference set; pass Pruning",
        ),
        ({"reference": []}, "the reference set has no samples; pass one that has some"),
        ({"module": Silent()}, r"^Silent does not say.*reference_losses\(batch\) that returns one a sample, or pass"),
        ({"loader": DataLoader(data(N))}, r"; make it DataLoader\(pruning, batch_size, sampler=pruning.sampler\)$"),
        ({"losses": lambda module, batch: module.losses(batch).mean()}, r"losses have shape \(\); return one a sample"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(settings, words):
    auto = {"score": "loss", "exclude": "auto", "labels": data(N)[:][1]} if "pruner" in settings else {}
    pruning = make(settings.pop("pruner", "infobatch"), **auto)
    callback = PruningCallback(pruning, settings.pop("reference", reference()), settings.pop("losses", None))
    module, loader = settings.pop("module", Module(pruning)), settings.pop("loader", loader_of(pruning))
    with pytest.raises(ValueError, match=words):
        trainer(pruning, callback, **settings).fit(module, loader)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({"shuffle": True}, "shuffle"), ({"sampler": DistributedSampler(data(12), 2, rank=1)}, "sampler")],
)
def test_a_reference_that_each_process_would_draw_otherwise_is_refused(options, remedy):
    pruning = make(rank=1, world_size=2)
    callback = PruningCallback(pruning, DataLoader(data(12), 5, **options))
    with pytest.raises(ValueError, match=f"some samples twice and others never; make it without {remedy}$"):
        trainer(pruning, callback).fit(Module(pruning), loader_of(pruning))


def test_a_pickled_pruning_as_spawned_processes_get_it_is_refused():
    pruning = make()
    callback = PruningCallback(pickle.loads(pickle.dumps(pruning)), reference())
    with pytest.raises(ValueError, match=r"its data set alone; pass Trainer\(strategy='ddp'\)"):
        trainer(pruning, callback).fit(Module(pruning), loader_of(pruning))


class Stop(lightning.Callback):
    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch == 2


def test_a_pruning_that_was_trained_with_goes_on_in_its_trainer_or_from_a_checkpoint_alone(tmp_path):
    done, used, begun = make(), make(), make()
    trainer(done).fit(Module(done), loader_of(done))
    first, module = trainer(used, Stop(), ModelCheckpoint(tmp_path)), Module(used)
    first.fit(module, loader_of(used))
    assert used.epoch == 3
    begun.update(torch.tensor([begun.order()[0]]), torch.ones(1))
    for pruning in (done, used, begun):
        before = pruning.report()
        with pytest.raises(
            ValueError, match=r"^the pruning has been trained with; make a new one, or pass fit\(\.\.\., c"
        ):
            trainer(pruning).fit(Module(pruning), loader_of(pruning))
        assert pruning.report().equals(before)
    saved = next(tmp_path.iterdir())
    again = Module(used)
    trainer(used).fit(again, loader_of(used), ckpt_path=saved, weights_only=True)
    assert used.epoch == EPOCHS
    whole = make()
    expected = by_hand(whole)
    assert used.sizes == whole.sizes
    torch.testing.assert_close(again.net.state_dict(), expected.net.state_dict())


def test_a_fit_goes_on_in_the_trainer_that_it_was_stopped_in():
    pruning, whole = make(), make()
    fit, module = trainer(pruning, Stop()), Module(pruning)
    fit.fit(module, loader_of(pruning))
    assert pruning.epoch == 3
    fit.fit(module, loader_of(pruning))
    by_hand(whole)
    assert pruning.sizes == whole.sizes


def test_a_checkpoint_without_pruning_is_refused(tmp_path):
    plain, pruning, saved = make(), make(), ModelCheckpoint(tmp_path)
    lightning.Trainer(max_epochs=1, callbacks=[saved], accelerator="cpu", logger=False).fit(
        Module(plain), loader_of(plain)
    )
    with pytest.raises(ValueError, match=r"^the checkpoint was saved without PruningCallback; "):
        trainer(pruning).fit(Module(pruning), loader_of(pruning), ckpt_path=saved.best_model_path, weights_only=True)
    trainer(pruning).validate(Module(pruning), DataLoader(make()), ckpt_path=saved.best_model_path, weights_only=True)


def test_a_checkpoint_within_an_epoch_of_other_processes_is_refused():
    pruning = make()
    pruning.update(torch.tensor([3]), torch.ones(1))
    callback = PruningCallback(pruning, reference())
    with pytest.raises(ValueError, match="within an epoch of 2 processes and there are 1; start 2, or resume from the"):
        callback.load_state_dict({**callback.state_dict(), "processes": 2})


def replaced(rank):
    pruning = make()
    trainer(pruning, strategy="ddp", devices=2, use_distributed_sampler=True).fit(Module(pruning), loader_of(pruning))


def test_a_sampler_that_lightning_replaces_is_one_sentence(together):
    for error in together(2, replaced):
        assert str(error).endswith("in place of pruning.sampler; pass Trainer(use_distributed_sampler=False)")


def misplaced(rank, arguments, strategy):
    pruning = make(**arguments)
    strategy = ModelParallelStrategy(**strategy) if strategy else "ddp"
    fit = trainer(pruning, strategy=strategy, devices=dist.get_world_size())
    fit.fit(Parts(pruning, 0), loader_of(pruning))


@pytest.mark.parametrize(
    ("ranks", "arguments", "strategy", "takes", "gives", "remedy"),
    [
        (2, {}, TENSORS, 1, 2, "pass rank=0, world_size=1, and each selects the same"),
        (2, ALONE, None, 2, 1, "leave rank and world_size out"),
        (4, {}, {**TENSORS, "data_parallel_size": 2}, 2, 4, "train by data parallelism or by tensor parallelism alone"),
    ],
)
def test_processes_that_would_not_get_the_batches_that_they_need_are_one_sentence(
    together, ranks, arguments, strategy, takes, gives, remedy
):
    for error in together(ranks, misplaced, arguments, strategy):
        assert str(error) == (
            f"the Trainer's processes take {takes} different batches in a step, and the pruning gives them {gives}; "
            + remedy
        )
