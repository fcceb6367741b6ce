"""Dynamic pruning in Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler, RandomSampler

from ..pruning import DynamicPruning
from .reference import dealt, evaluating, gathered, needs_reference


class PruningCallback(Callback):
    """Ends the pruning's epochs, and carries its state in Lightning's checkpoints.

    >>> loader = DataLoader(pruning, 128, sampler=pruning.sampler)                  # doctest: +SKIP
    >>> trainer = Trainer(                                                          # doctest: +SKIP
    ...     max_epochs=pruning.epochs,
    ...     callbacks=[PruningCallback(pruning, reference=trusted)],
    ...     reload_dataloaders_every_n_epochs=1,
    ...     use_distributed_sampler=False,
    ... )
    >>> trainer.fit(module, loader)                                                 # doctest: +SKIP

    The module's ``training_step`` returns what ``pruning.update(index, losses)`` does. An epoch ends with its last
    step, before Lightning validates or saves. Training goes on exactly from a checkpoint within an epoch too, in as
    many processes as saved it, although Lightning warns that the loader is not resumable.

    Args:
        pruning: of as many epochs as ``max_epochs``.
        reference: loader of the trusted set's batches, whole and in one order in each process, which evaluates every
            world_size-th.
        losses: ``losses(module, batch)`` gives the losses (B,) of a batch of it; the module's own
            ``reference_losses(batch)`` without one.
    """

    def __init__(
        self,
        pruning: DynamicPruning,
        reference: Iterable[Any] | None = None,
        losses: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.pruning, self.reference, self.losses = pruning, reference, losses

    def reference_loss(self, trainer: Trainer, module: LightningModule) -> Any:
        """Return what `DynamicPruning.end_epoch` takes; override it where there is no loader of trusted samples."""
        if self.reference is None:
            return None
        losses = self.losses or type(module).reference_losses
        parts = []
        with evaluating(module), trainer.precision_plugin.forward_context():
            for batch, counts in dealt(self.reference, self.pruning.processes):
                parts.append((losses(module, trainer.strategy.batch_to_device(batch)), counts))
        return gathered(self.pruning, parts)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Raise ValueError where the pruning has been pickled."""
        if not isinstance(self.pruning, DynamicPruning):
            raise ValueError(
                "this process has a pickled copy of the pruning, which is its data set alone; pass "
                "Trainer(strategy='ddp')"
            )

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise ValueError, in one sentence, where the Trainer would not train what the pruning selects."""
        pruning, overridden = self.pruning, type(self).reference_loss is not PruningCallback.reference_loss
        epochs = trainer.max_epochs
        if trainer.reload_dataloaders_every_n_epochs != 1:
            raise ValueError(
                f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs} would keep the first "
                "epoch's number of steps; pass Trainer(reload_dataloaders_every_n_epochs=1)"
            )
        if epochs != pruning.epochs - pruning.first and not trainer.fast_dev_run:
            raise ValueError(
                f"max_epochs={epochs} is not the pruning's; pass Trainer(max_epochs={pruning.epochs - pruning.first})"
            )
        limit = trainer.limit_train_batches
        cuts = {
            f"overfit_batches={trainer.overfit_batches}": trainer.overfit_batches > 0,
            f"limit_train_batches={limit}": isinstance(limit, int) or limit < 1,
            f"max_steps={trainer.max_steps}": trainer.max_steps != -1,
        }
        for setting, cut in cuts.items():
            if cut and not trainer.fast_dev_run:
                raise ValueError(f"{setting} would train on less than what is selected; leave it out")
        if not trainer.ckpt_path and (pruning.epoch - pruning.first != trainer.current_epoch or pruning.running.step):
            raise ValueError(
                "the pruning has been trained with; make a new one, or pass fit(..., ckpt_path=checkpoint)"
            )
        if (why := needs_reference(pruning)) and self.reference is None and not overridden:
            raise ValueError(f"{why} a reference set; pass PruningCallback(pruning, reference=loader)")
        if pruning.divide and (theirs := trainer.distributed_sampler_kwargs):
            pruning.processes.check_batches("the Trainer", theirs["num_replicas"])
        drawn = getattr(self.reference, "sampler", None)
        if pruning.processes.size > 1 and isinstance(drawn, RandomSampler | DistributedSampler):
            raise ValueError(
                "the reference loader draws other batches in each process, which would evaluate some samples twice and "
                f"others never; make it without {'shuffle' if isinstance(drawn, RandomSampler) else 'sampler'}"
            )
        pruning.check_told()
        if self.reference is not None and self.losses is None and not hasattr(module, "reference_losses"):
            raise ValueError(
                f"{type(module).__name__} does not say what its losses are; give it a method reference_losses(batch) "
                "that returns one a sample, or pass PruningCallback(..., losses=function of module and batch)"
            )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise ValueError, in one sentence, where no loader draws what the pruning selects."""
        loaders = trainer.fit_loop._combined_loader.flattened
        samplers = [getattr(loader, "sampler", None) for loader in loaders]
        samplers += [getattr(getattr(loader, "batch_sampler", None), "sampler", None) for loader in loaders]
        if self.pruning.sampler not in samplers:
            distributed = any(isinstance(sampler, DistributedSampler) for sampler in samplers)
            raise ValueError(
                "Lightning has put a DistributedSampler in place of pruning.sampler; pass "
                "Trainer(use_distributed_sampler=False)"
                if distributed
                else "the training loader does not draw what the pruning selects; make it DataLoader(pruning, "
                "batch_size, sampler=pruning.sampler)"
            )
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        if self.pruning.running.step == 0 and batches.ready:
            # Resumed from a checkpoint that was saved in an epoch's last step: Lightning begins the next epoch at its
            # first step only where the last one had as many as the next one has.
            batches.completed = trainer.num_training_batches

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *batch: Any) -> None:
        if trainer.is_last_batch:
            self.pruning.end_epoch(self.reference_loss(trainer, module))

    def state_dict(self) -> dict[str, Any]:
        """Return the pruning's state; all processes call it."""
        if self.pruning.running.step:
            self.pruning.exchange()
        return {"pruning": self.pruning.state_dict(), "processes": self.pruning.processes.size}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError where the fit would go on from a checkpoint that holds no pruning."""
        if trainer.training and self.state_key not in checkpoint["callbacks"]:
            raise ValueError("the checkpoint was saved without PruningCallback; pass fit(ckpt_path=) one saved with it")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state within an epoch of another number of processes."""
        size = self.pruning.processes.size
        if state["pruning"]["running"]["step"] and state["processes"] != size:
            raise ValueError(
                f"the checkpoint was saved within an epoch of {state['processes']} processes and there are {size}; "
                f"start {state['processes']}, or resume from the end of an epoch"
            )
        self.pruning.load_state_dict(state["pruning"])
        self.pruning.sampler.leave_out_trained()
