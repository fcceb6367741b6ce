"""Dynamic pruning in Hugging Face's Trainer, and so in those made of it, such as TRL's.

Shape legend: B samples of a batch, T tokens, C classes or words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import get_last_checkpoint, seed_worker

from ..files import write_atomically
from ..pruning import DynamicPruning
from ..pruning.losses import one_a_sample
from .reference import dealt, evaluating, gathered, needs_reference

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

INDEX = "sample_index"  # of a batch's samples, beside what the collator makes of them
STATE = "pruning.pt"  # in a checkpoint's folder
NO_LABEL = -100


class PruningMixin(Base):
    """Makes a Trainer train on what a `DynamicPruning` selects.

    >>> class PruningTrainer(PruningMixin, Trainer): ...                            # doctest: +SKIP
    >>> pruning = DynamicPruning(train_set, epochs=5, window=3)                     # doctest: +SKIP
    >>> trainer = PruningTrainer(                                                   # doctest: +SKIP
    ...     model, TrainingArguments(folder, num_train_epochs=5), pruning=pruning, reference_dataset=trusted
    ... )

    An epoch ends with its last step, before the Trainer evaluates or saves. Learning rate schedules go by
    ``pruning.progress``, so that they end where they should; ``max_steps`` is the number of steps planned, which
    becomes the true one by the last epoch. Checkpoints hold the pruning's state, and training goes on from one exactly,
    within an epoch too.

    Args:
        pruning: of ``num_train_epochs`` epochs, on the training set, which `train_dataset` may leave out.
        reference_dataset: the trusted set, of items as the training set's.

    Raises ValueError, in one sentence, for arguments under which the Trainer would not train what is selected.
    """

    def __init__(self, *args: Any, pruning: DynamicPruning, reference_dataset: Any = None, **kwargs: Any) -> None:
        if len(args) < 4 and kwargs.get("train_dataset") in (None, pruning):  # the fourth is train_dataset
            kwargs["train_dataset"] = pruning.dataset
        super().__init__(*args, **kwargs)
        self.pruning, self.reference_dataset = pruning, reference_dataset
        self._check_arguments()
        pruning.dataset = self.train_dataset  # as the Trainer may have tokenised it
        self.model_accepts_loss_kwargs = False  # losses are means of a batch's samples, not of an update's tokens
        self.add_callback(_EndOfEpoch(self))

    def sample_losses(self, outputs: Any, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the losses (B,) of a batch; override it for a loss of your own.

        Under ``label_smoothing_factor`` the Trainer trains on those of that ``smoothing``; what is recorded, and what
        the trusted set has, is plain.

        Cross-entropy, that of tokens (B, T) averaged over those that are labelled, each predicted from those before it
        in a causal language model; squared error where labels are numbers, as many as outputs; and the mean binary
        cross-entropy where they are several yes or no. Which one a classifier's labels are is its ``problem_type``,
        and without one what the model would take them for: numbers where ``num_labels=1``, else a class where they are
        whole and several yes or no where they are not.
        """
        logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
        problem = self._problem(labels)
        index = torch.arange(len(labels))
        if problem == "multi_label_classification":
            losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
            return one_a_sample("the loss", losses, index, "mean")
        if problem == "regression" or labels.is_floating_point():
            return one_a_sample("the loss", (logits.reshape(labels.shape) - labels) ** 2, index, "mean")
        if self._predicts_the_next():
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = F.cross_entropy(
            logits.transpose(1, -1), labels, reduction="none", ignore_index=NO_LABEL, label_smoothing=smoothing
        )
        return one_a_sample("the loss", losses, index, "mean", labels != NO_LABEL)

    def reference_loss(self) -> Any:
        """Return what `DynamicPruning.end_epoch` takes; override it where there is no trusted set."""
        if self.reference_dataset is None:
            return None
        processes, samples = self.pruning.processes, range(len(self.reference_dataset))
        size, each = processes.size, processes.size * self.args.per_device_eval_batch_size
        batches = (samples[start + rank : start + each : size] for start in samples[::each] for rank in range(size))
        own = [*dealt(filter(len, batches), processes)]
        indices = [[*batch] for batch, _ in own]
        loader = DataLoader(self.reference_dataset, batch_sampler=indices, collate_fn=self._collator("Reference"))
        parts = []
        with evaluating(self.model):
            for batch, (_, counts) in zip(loader, own, strict=True):
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    parts.append((self._losses(self.model, batch)[0], counts))
        return gathered(self.pruning, parts)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's.

        Raises ValueError where the pruning is not at the start, or its score has not been told what it goes by, or the
        checkpoint is of none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no checkpoint; leave resume_from_checkpoint out")
        if resume_from_checkpoint:
            self._resume(str(resume_from_checkpoint))
        elif self.pruning.epoch > self.pruning.first or self.pruning.running.step:
            raise ValueError("the pruning has been trained with; make a new one, or pass resume_from_checkpoint")
        self.pruning.check_told()
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ValueError: a search trains many times, and a pruning once."""
        raise ValueError(
            "hyperparameter_search would train many times with one pruning; make a Trainer and a pruning for each trial"
        )

    def get_train_dataloader(self) -> DataLoader:
        options: dict[str, Any] = {}
        if self.args.dataloader_num_workers:
            options = {
                "persistent_workers": self.args.dataloader_persistent_workers,
                "prefetch_factor": self.args.dataloader_prefetch_factor,
                "multiprocessing_context": getattr(self.args, "dataloader_multiprocessing_context", None),
                "in_order": getattr(self.args, "dataloader_in_order", True),
                "worker_init_fn": partial(  # each process's draw otherwise
                    seed_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index
                ),
            }
        return self.pruning.prepare(
            self.accelerator,
            self._train_batch_size * (self.args.world_size if self.accelerator.split_batches else 1),
            collate_fn=_Collator(self._collator("Training")),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=self.args.dataloader_drop_last,
            **options,
        )

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        index = inputs.pop(INDEX, None)
        if index is None:  # an evaluation's
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        plain, outputs = self._losses(model, inputs)
        smoothing = self.args.label_smoothing_factor
        losses = self.sample_losses(outputs, inputs["labels"], smoothing=smoothing) if smoothing else plain
        loss = self.pruning.update(index, losses, plain)
        return (loss, outputs) if return_outputs else loss

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        own = self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if own is None and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [self._by_progress(factor, num_training_steps) for factor in scheduler.lr_lambdas]
        return scheduler

    def set_initial_training_values(self, args: Any, dataloader: Any, *rest: Any) -> tuple[Any, ...]:
        if not len(dataloader):  # a run that is resumed at its end
            dataloader = DataLoader(self.pruning, self._train_batch_size)
        *values, _ = super().set_initial_training_values(args, dataloader, *rest)
        return (*values, self.planned_steps())

    def planned_steps(self) -> int:
        """Return the number of optimizer steps of the whole run, as far as it can be told by now."""
        return self.pruning.planned_steps(
            self._train_batch_size, self.args.dataloader_drop_last, self.args.gradient_accumulation_steps
        )

    def end_epoch(self) -> None:
        """End the pruning's epoch; all processes call it."""
        self.pruning.end_epoch(self.reference_loss())
        self.state.max_steps = self.planned_steps()

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the epochs done, and the batches of the running one, which are not all of one number of steps."""
        super()._init_training_state(*args, **kwargs)
        return self.pruning.epoch - self.pruning.first, self.pruning.running.step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Give the epoch the number of steps that it has, not that of the first one."""
        batches = len(kwargs["train_dataloader"])
        kwargs["steps_in_epoch"] = batches
        kwargs["num_update_steps_per_epoch"] = -(-batches // self.args.gradient_accumulation_steps)
        return super()._run_epoch(*args, **kwargs)

    def _losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError("the batches have no labels; name that column of the data set labels")
        if not getattr(self._bare_model().config, "is_encoder_decoder", False):
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs)
        return self.sample_losses(outputs, labels), outputs

    def _collator(self, description: str) -> Callable[[list[Any]], Any]:
        return self._get_collator_with_removed_columns(self.data_collator, description=description)

    def _bare_model(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        model = getattr(model, "_orig_mod", model)  # of one that torch.compile returned
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def _problem(self, labels: Tensor) -> str | None:
        """Return the ``problem_type``, set where it is not as the model does where it is given the labels."""
        model = self._bare_model()
        classifies = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForSequenceClassificationLoss
        if classifies and model.config.problem_type is None:
            whole = labels.dtype in (torch.long, torch.int)
            several = "single_label_classification" if whole else "multi_label_classification"
            model.config.problem_type = "regression" if model.config.num_labels == 1 else several
        return getattr(model.config, "problem_type", None)

    def _predicts_the_next(self) -> bool:
        """Return whether the model's own loss is that of each token predicted from those before it."""
        model = self._bare_model()
        if {kind.__name__ for kind in type(model).__mro__} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            return True
        decodes = not getattr(model.config, "is_encoder_decoder", False)
        return decodes and LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss

    def _by_progress(self, factor: Callable[[Any], float], steps: int) -> Callable[[int], float]:
        return self.pruning.schedule(lambda progress: factor(progress * steps))

    def _resume(self, folder: str) -> None:
        if not hasattr(super(), "_init_training_state"):
            raise ValueError("this version of transformers cannot resume with epochs of unequal length; install 5.13")
        path = Path(folder) / STATE
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {STATE}: it was saved without pruning, or with save_only_model=True; resume from "
                "another checkpoint"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in self._steps_depend_on().items():
            if state["pruning"]["running"]["step"] and state[name] != value:
                raise ValueError(
                    f"{folder} was saved within an epoch of {name}={state[name]}, and it is {value} here; resume from "
                    "the end of an epoch"
                )
        self.pruning.load_state_dict(state["pruning"])

    def _steps_depend_on(self) -> dict[str, int]:
        return {"processes": self.args.world_size, "batch_size": self._train_batch_size}

    def save_pruning(self) -> None:
        """Save the pruning's state in the latest checkpoint's folder; all processes call it."""
        if self.pruning.running.step:
            self.pruning.exchange()
        state = {"pruning": self.pruning.state_dict(), **self._steps_depend_on()}
        if self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            write_atomically(folder / STATE, lambda file: torch.save(state, file))

    def _check_arguments(self) -> None:
        pruning, args, epochs = self.pruning, self.args, self.pruning.epochs - self.pruning.first
        own_reference = type(self).reference_loss is not PruningMixin.reference_loss
        strategy = getattr(args, "train_sampling_strategy", "random")
        samples = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else "no number of"
        wrong = {
            f"max_steps={args.max_steps} is no number of epochs; leave max_steps out": args.max_steps > 0,
            f"num_train_epochs={args.num_train_epochs:g} is not the pruning's; set num_train_epochs={epochs}": (
                args.num_train_epochs != epochs
            ),
            f"train_sampling_strategy={strategy!r} is not how the pruning draws; leave it out": strategy != "random",
            f"data_seed={args.data_seed} seeds nothing that is drawn; leave it out, and make DynamicPruning(…, "
            f"seed={args.data_seed})": (args.data_seed is not None),
            "auto_find_batch_size would begin an epoch twice; leave it out": args.auto_find_batch_size,
            "ignore_data_skip would train samples twice; leave it out": args.ignore_data_skip,
            "compute_loss_func gives one loss a batch; override sample_losses, which gives one a sample": (
                self.compute_loss_func is not None
            ),
            "label_smoothing_factor smooths no loss of your own; leave it out, or let sample_losses take smoothing": (
                args.label_smoothing_factor > 0 and "smoothing" not in inspect.signature(self.sample_losses).parameters
            ),
            f"{needs_reference(pruning)} a reference set; pass reference_dataset": (
                needs_reference(pruning) and self.reference_dataset is None and not own_reference
            ),
            f"the Trainer has {samples} samples and the pruning {pruning.n}; give both the same data set, and let "
            "nothing pack or filter it": samples != pruning.n,
        }
        for sentence, holds in wrong.items():
            if holds:
                raise ValueError(sentence)


class _EndOfEpoch(TrainerCallback):
    """Ends epochs and saves the pruning's state, by the Trainer's clock."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **rest: Any) -> None:
        if self.trainer.pruning.running.step == len(train_dataloader):
            self.trainer.end_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if control.should_epoch_stop and self.trainer.pruning.running.step:
            self.trainer.end_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if not args.save_only_model:
            self.trainer.save_pruning()


class _Collator:
    """Collates the items of (index, item) by ``collate``, whatever they are, and puts the indices beside them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[int, Any]]) -> Any:
        batch = self.collate([item for _, item in pairs])
        batch[INDEX] = torch.tensor([index for index, _ in pairs])
        return batch
