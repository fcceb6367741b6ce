"""The plug-in in Hugging Face's own Trainer, with tiny models made of their configurations."""

import copy
import io
import os
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import distributed as dist
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from alignprune_exp.frameworks.transformers import PruningMixin
from alignprune_exp.pruning import DynamicPruning, within_class
from alignprune_exp.pruning.readout import WEAK, readout

N, EPOCHS, BATCH, WORDS, LENGTH, CLASSES = 48, 5, 8, 17, 7, 3
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


class PruningTrainer(PruningMixin, Trainer):
    pass


def texts(n=N, seed=0):
    """Documents of one of three dialects, each with a column that no model knows."""
    rng = np.random.default_rng(seed)
    classes = np.arange(n) % CLASSES
    words = classes[:, None] * 5 + rng.integers(0, 5, (n, LENGTH))
    return [
        {"input_ids": ids, "labels": label, "title": "…"}
        for ids, label in zip(words.tolist(), classes.tolist(), strict=True)
    ]


def documents(n=N, seed=0):
    """The same, of unequal lengths, of which some tokens are no target."""
    rng = np.random.default_rng(seed + 1)
    found = []
    for number, text in enumerate(texts(n, seed)):
        length = int(rng.integers(3, LENGTH + 1))
        ids = text["input_ids"][:length] + [16] * (LENGTH - length)
        labels = [-100, *ids[1:length]] if number % 2 else ids[:length]
        found.append({"input_ids": ids, "labels": labels + [-100] * (LENGTH - length)})
    return found


def classifier(**settings):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings = {"num_labels": CLASSES, **settings}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, **size, **settings))


def language_model():
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}
    still = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **size, **still, bos_token_id=None, eos_token_id=None))


def make(dataset, pruner="infobatch", score="das", **arguments):
    return DynamicPruning(dataset, EPOCHS, pruner, score, **{"window": 3, "seed": 1, **arguments})


def trainer(folder, model, pruning, reference, callbacks=(), eval_dataset=None, **settings):
    settings = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **settings,
    }
    return PruningTrainer(
        model,
        TrainingArguments(str(folder), **settings),
        pruning=pruning,
        reference_dataset=reference,
        eval_dataset=eval_dataset,
        callbacks=[*callbacks],
    )


class Watch(TrainerCallback):
    """What the Trainer says of its steps."""

    def __init__(self):
        self.rates, self.epochs, self.planned = [], [], []

    def on_step_end(self, args, state, control, optimizer=None, **rest):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.epochs.append(state.epoch)
        self.planned.append(state.max_steps)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_classifier_trains_on_what_is_selected_and_its_schedule_ends_where_it_should(tmp_path, accumulate, schedule):
    pruning, watch = make(texts()), Watch()
    settings = {"gradient_accumulation_steps": accumulate, "lr_scheduler_type": schedule, "warmup_steps": 2}
    hf = trainer(tmp_path, classifier(), pruning, texts(9, 1), [watch], **settings)
    result = hf.train()
    batches = [-(-size // BATCH) for size in pruning.sizes]
    steps = [-(-count // accumulate) for count in batches]
    assert pruning.epoch == EPOCHS
    assert sum(pruning.sizes) < N * EPOCHS
    assert pruning.times_selected.sum() == sum(pruning.sizes)
    assert result.global_step == sum(steps) == hf.state.max_steps
    assert (np.diff(watch.planned) <= 0).all()
    assert watch.rates[-1] == pytest.approx(0, abs=1e-12)
    assert (np.diff(watch.rates[2:]) < 0).all()
    np.testing.assert_allclose(np.array(watch.epochs)[np.cumsum(steps) - 1], np.arange(1, EPOCHS + 1))
    report = pruning.report()
    hf.model.eval()
    assert report["loss"].notna().all()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_steps_planned_are_those_made_where_batches_are_dropped_and_accumulated(tmp_path, accumulate):
    pruning, watch = make(texts(), "random", ratio=0.35), Watch()
    settings = {"dataloader_drop_last": True, "gradient_accumulation_steps": accumulate}
    hf = trainer(tmp_path, classifier(), pruning, texts(9, 1), [watch], **settings)
    hf.train()
    steps = sum(-(-(size // BATCH) // accumulate) for size in pruning.sizes)
    assert hf.state.global_step == hf.state.max_steps == steps
    assert set(watch.planned) == {steps}


SIEVE = {"pruner": "sieve", "score": "cleaning", "exclude": "auto"}


@pytest.mark.parametrize(("causal", "selected"), [(False, {}), (True, {}), (False, SIEVE)])
def test_without_dropout_it_is_the_loop_of_ones_own(tmp_path, causal, selected):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = language_model() if causal else classifier(**still)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data, accumulate = (documents, 2) if causal else (texts, 1)
    pruning, own = (make(data(), **selected, labels=np.arange(N) % CLASSES) for _ in range(2))
    hf = trainer(
        *(tmp_path, copy.deepcopy(model), pruning, data(9, 1)),
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0,
        gradient_accumulation_steps=accumulate,
    )
    hf.data_collator = Padding()
    hf.train()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, own.schedule(lambda progress: 1 - progress))

    def losses(items):
        """Each one's by the model itself."""
        return torch.stack([model(**Padding()([item])).loss for item in items])

    for _ in range(EPOCHS):
        model.train()
        for step in torch.from_numpy(own.order()).split(BATCH * accumulate):
            batches = step.split(BATCH)
            for index in batches:
                loss = own.update(index, losses([own.dataset[i] for i in index]))
                (loss / len(batches)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            own.end_epoch(losses(data(9, 1)))
    assert pruning.sizes == own.sizes
    assert pruning.noise_rate == pytest.approx(own.noise_rate, rel=1e-3, nan_ok=not selected)
    np.testing.assert_allclose(pruning.report(), own.report(), rtol=1e-3, atol=1e-4)


class Padding:
    """A collator that knows nothing of indices."""

    def __call__(self, items):
        assert not any("sample_index" in item for item in items)
        return {name: torch.tensor([item[name] for item in items]) for name in ("input_ids", "labels")}


class OfOnesOwn(GPT2LMHeadModel):
    """A class that no list of causal language models names."""


def of_ones_own():
    torch.manual_seed(0)
    return OfOnesOwn(language_model().config)


def compiled():
    return torch.compile(language_model(), backend="eager")


SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def of_text():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=WORDS, bos_token_id=None, eos_token_id=None))


def of_images_and_text():
    torch.manual_seed(0)
    images = CLIPVisionConfig(**SIZE, image_size=8, patch_size=4)
    text = LlamaConfig(**SIZE, vocab_size=WORDS + 1, bos_token_id=None, eos_token_id=None)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=images, text_config=text, image_token_id=WORDS))


def encoder_and_decoder():
    torch.manual_seed(0)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, **size, decoder_start_token_id=0))


@pytest.mark.parametrize("model", [language_model, of_ones_own, compiled, of_images_and_text, encoder_and_decoder])
def test_the_loss_of_a_document_is_the_models_own_the_mean_of_its_labelled_tokens(tmp_path, model):
    pruning = make(documents(12), "full", "loss")
    hf = trainer(tmp_path, model(), pruning, None, learning_rate=0.0, remove_unused_columns=False)
    hf.data_collator = Padding()
    hf.train()
    model = model().eval()
    for number, document in enumerate(pruning.dataset):
        ids, labels = (torch.tensor([document[name]]) for name in ("input_ids", "labels"))
        expected = model(input_ids=ids, labels=labels).loss.item()  # the model's own, of one document
        assert pruning.trajectories.last_N[number].item() == pytest.approx(expected, rel=1e-4)


def test_a_causal_language_model_learns(tmp_path):
    pruning = make(documents())
    hf = trainer(tmp_path, language_model(), pruning, documents(9, 1), gradient_accumulation_steps=2)
    hf.data_collator = Padding()
    hf.train()
    history = pruning.trajectories.history().reference_W
    assert history[-1] < history[0]
    assert sum(pruning.sizes) < N * EPOCHS
    metrics = hf.evaluate(documents(9, 1))
    assert np.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("causal", [False, True])
def test_training_resumed_from_any_checkpoint_ends_as_if_never_interrupted(tmp_path, causal):
    data, model = (documents, language_model) if causal else (texts, classifier)
    settings = {"save_strategy": "steps", "save_steps": 4, "seed": 3, "gradient_accumulation_steps": 1 + causal}

    def begin():
        hf = trainer(tmp_path, model(), make(data()), data(9, 1), **settings)
        hf.data_collator = Padding()
        return hf

    whole = begin()
    whole.train()
    saved = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(saved) == -(-whole.state.global_step // 4)
    settings["save_strategy"] = "no"
    for path in saved[:: 1 + causal]:
        resumed = begin()
        resumed.train(resume_from_checkpoint=str(path))
        assert resumed.state.global_step == whole.state.global_step, path.name
        assert resumed.pruning.report().equals(whole.pruning.report()), path.name
        torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    state = torch.load(saved[0] / "pruning.pt", weights_only=True)
    torch.save({**state, "batch_size": 3}, saved[0] / "pruning.pt")
    with pytest.raises(ValueError, match="an epoch of batch_size=3, and it is 8 here; resume from the end of"):
        resumed.train(resume_from_checkpoint=str(saved[0]))
    again = resumed.train(resume_from_checkpoint=True)  # in the same object, which is done
    assert again.global_step == whole.state.global_step


def test_epochs_end_before_they_are_evaluated_or_saved(tmp_path):
    pruning, epochs = make(texts(), "random"), []

    class Listen(TrainerCallback):
        def on_save(self, args, state, control, **rest):
            path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}", "trainer_state.json")
            epochs.append((pruning.epoch, os.path.exists(path)))

    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "dataloader_num_workers": 1}
    hf = trainer(tmp_path, classifier(), pruning, texts(9, 1), [Listen()], texts(9, 2), **settings)
    hf.train()
    assert epochs == [(epoch, True) for epoch in range(1, EPOCHS + 1)]
    state = torch.load(next(tmp_path.glob("*/pruning.pt")), weights_only=True)
    assert set(state) == {"pruning", "processes", "batch_size"}


@pytest.mark.parametrize(
    ("labels", "settings"),
    [
        (lambda number: number % CLASSES, {}),
        (lambda number: float(number % 5), {"num_labels": 1}),
        (lambda number: number % 5, {"num_labels": 1}),
        (lambda number: [float(number % 2), 1.0, 0.0], {}),
        (lambda number: [float(number % 2), 1.0], {"num_labels": 2, "problem_type": "multi_label_classification"}),
        (lambda number: [number % 5, 7], {"num_labels": 2, "problem_type": "regression"}),
    ],
)
def test_a_classifier_has_the_loss_that_it_has_by_itself_all_through(tmp_path, labels, settings):
    data = [{**text, "labels": labels(number)} for number, text in enumerate(texts(12))]
    model = classifier(**settings)
    own = copy.deepcopy(model).eval()
    pruning, found = make(data, "full", "loss"), []
    model.eval().train = lambda mode=True: model

    class Listen(TrainerCallback):
        def on_epoch_end(self, args, state, control, **rest):
            found.append(pruning.trajectories.last_N.clone())

    settings = {"learning_rate": 0.0, "eval_strategy": "epoch"}
    trainer(tmp_path, model, pruning, None, [Listen()], data[:2], **settings).train()
    expected = torch.stack([own(**Padding()([item])).loss for item in data])
    torch.testing.assert_close(torch.stack(found), expected.expand(EPOCHS, -1), rtol=1e-4, atol=1e-6)
    assert expected.mean().item() == pytest.approx(own(**Padding()(data)).loss.item(), rel=1e-5)
    assert model.config.problem_type == own.config.problem_type


@pytest.mark.parametrize("causal", [False, True])
def test_smoothed_labels_are_trained_on_as_the_trainer_does_and_plain_losses_recorded(tmp_path, causal):
    model, data = (language_model(), documents()) if causal else (classifier(), texts())
    pruning = make(data, "full", "loss")
    hf = trainer(tmp_path, model.eval(), pruning, data[:9], label_smoothing_factor=0.3)
    hf.data_collator = Padding()
    plain, trained, theirs = [], [], []
    for number, item in enumerate(data):
        batch = Padding()([item])
        plain.append(model(**batch).loss.item())
        trained.append(hf.compute_loss(model, {**batch, "sample_index": torch.tensor([number])}).item())
        theirs.append(hf.compute_loss(model, batch).item())  # an evaluation's, the Trainer's own
    hf.end_epoch()
    history = pruning.trajectories.history()
    np.testing.assert_allclose(trained, theirs, rtol=1e-4)
    np.testing.assert_allclose(history.last_N, plain, rtol=1e-4)
    assert history.reference_W[-1].item() == pytest.approx(np.mean(plain[:9]), rel=1e-4)
    assert (np.abs(np.subtract(trained, plain)) > 1e-4).mean() > 0.9


def test_a_sample_without_a_label_is_refused(tmp_path):
    data = [{**text, "labels": -100 if number == 5 else text["labels"]} for number, text in enumerate(texts())]
    with pytest.raises(ValueError, match="its mask is empty; leave such samples out of the data set"):
        trainer(tmp_path, classifier(), make(data), texts(9, 1)).train()


def test_token_classes_are_not_shifted(tmp_path):
    torch.manual_seed(0)
    model = BertForTokenClassification(classifier().config)
    data = [{"input_ids": text["input_ids"], "labels": [-100, *([text["labels"]] * (LENGTH - 1))]} for text in texts(9)]
    pruning = make(data, "full", "loss")
    hf = trainer(tmp_path, model, pruning, None)
    hf.data_collator = Padding()
    model.eval()
    batch = Padding()(data)
    own = hf.sample_losses(model(input_ids=batch["input_ids"]), batch["labels"])
    assert own.mean().item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_the_readme_runs(in_the_readme, tmp_path):
    given = {"Trainer": Trainer, "TrainingArguments": TrainingArguments, "DynamicPruning": DynamicPruning}
    given |= {"texts": texts(), "trusted_texts": texts(9, 1), "model": classifier(), "folder": tmp_path}
    assert in_the_readme("Hugging Face's Trainer", given)["pruning"].epoch == 5


# ---- two processes -----------------------------------------------------------------------------------------


PLAIN = {"per_device_eval_batch_size": 2, "optim": "sgd", "max_grad_norm": 0}  # five batches of the reference set


def in_two(rank, folder, model=None):
    """Train a network that each process has whole, or the saved one that they divide."""
    warnings.simplefilter("ignore")
    pruning = make(documents(), "full", "loss", labels=range(N))
    settings = {"per_device_train_batch_size": BATCH // 2, "ddp_backend": "gloo", "save_strategy": "epoch", **PLAIN}
    if model:
        model = LlamaForCausalLM.from_pretrained(model, distributed_config=DistributedConfig(fsdp_size=2))
        settings["save_strategy"] = "no"
    hf = trainer(folder, model or language_model(), pruning, documents(9, 1), **settings)
    hf.data_collator = Padding()
    hf.train()
    assert hf.args.world_size == dist.get_world_size() == 2
    return pruning.report().to_numpy(), hf.state.global_step, pruning.noise_rate


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_as_one_does(together, tmp_path, sharded):
    model, saved = (of_text(), [tmp_path / "model"]) if sharded else (language_model(), [])
    for folder in saved:
        model.save_pretrained(folder)
    (report, steps, rate), (other, _, same) = together(2, in_two, tmp_path / "two", *saved)
    pruning = make(documents(), "full", "loss", labels=range(N))
    hf = trainer(tmp_path / "one", model, pruning, documents(9, 1), **PLAIN)
    hf.data_collator = Padding()
    hf.train()
    assert rate == same == pytest.approx(pruning.noise_rate, rel=1e-4)
    np.testing.assert_array_equal(report, other)
    np.testing.assert_allclose(report, pruning.report(), rtol=1e-4, atol=1e-5)
    assert steps == hf.state.global_step
    if not sharded:
        state = torch.load(io.BytesIO((tmp_path / "two" / f"checkpoint-{steps}" / "pruning.pt").read_bytes()))
        assert state["processes"] == 2


class Drawn(torch.utils.data.Dataset):
    """Texts of words that are drawn when they are read."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return {"input_ids": torch.randint(WORDS, (LENGTH,)).tolist(), "labels": 0}


def drawn(rank, folder):
    hf = trainer(folder, classifier(), make(Drawn(), score="loss"), None, ddp_backend="gloo", dataloader_num_workers=1)
    return next(iter(hf.get_train_dataloader()))["input_ids"].tolist()


def test_workers_of_two_processes_draw_otherwise(together, tmp_path):
    one, two = together(2, drawn, tmp_path)
    assert one != two


# ---- what a score is told ----------------------------------------------------------------------------------


def test_features_told_before_rank_from_the_first_epoch_on_and_go_on_from_a_checkpoint(tmp_path):
    labels = torch.tensor([text["labels"] for text in texts()])
    counts = torch.stack([torch.bincount(torch.tensor(text["input_ids"]), minlength=WORDS) for text in texts()]).float()
    values = readout(counts, labels, WEAK)

    def told_nothing():
        return make(texts(), "topk", "features", labels=labels, warmup=0, ratio=0.5)

    pruning = told_nothing()
    pruning.tell(values)
    best = within_class(values.margins.numpy(), labels.numpy()).argsort()[N // 2 :]
    assert sorted(pruning.order()) == sorted(best)
    trainer(tmp_path, classifier(), pruning, None, save_strategy="steps", save_steps=2).train()
    assert pruning.epoch == EPOCHS
    assert pruning.times_selected.sum() == EPOCHS * N // 2
    again = told_nothing()  # the state knows what was told
    trainer(tmp_path, classifier(), again, None).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pd.testing.assert_frame_equal(again.report(), pruning.report())
    forgotten = told_nothing()
    with pytest.raises(ValueError, match=r"^score='features' goes by what you tell of every sample before training; c"):
        trainer(tmp_path, classifier(), forgotten, None).train()
    assert forgotten.running.step == 0


# ---- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 10}, "max_steps=10 is no number of epochs; leave max_steps out"),
        ({"num_train_epochs": 3}, "num_train_epochs=3 is not the pruning's; set num_train_epochs=5"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size would begin an epoch twice; leave it out"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy='group_by_length' is not how the pruning draws; leave it out",
        ),
        (
            {"data_seed": 7},
            r"data_seed=7 seeds nothing that is drawn; leave it out, and make DynamicPruning\(…, seed=7\)",
        ),
        ({"ignore_data_skip": True}, "ignore_data_skip would train samples twice; leave it out"),
        ({"reference": None}, "score='das' compares with a reference set; pass reference_dataset"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(tmp_path, settings, words):
    reference = settings.pop("reference", texts(9, 1))
    with pytest.raises(ValueError, match=f"^{words}$"):
        trainer(tmp_path, classifier(), make(texts()), reference, **settings)


def test_smoothing_that_a_loss_of_ones_own_does_not_take_and_a_search_are_refused(tmp_path):
    class Own(PruningTrainer):
        def sample_losses(self, outputs, labels):
            return super().sample_losses(outputs, labels)

    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=EPOCHS, use_cpu=True, report_to="none", label_smoothing_factor=0.1
    )
    with pytest.raises(ValueError, match=r"^label_smoothing_factor smooths no loss of your own; leave it out, or let"):
        Own(classifier(), arguments, pruning=make(texts()), reference_dataset=texts(9, 1))
    hf = trainer(tmp_path, classifier(), make(texts()), texts(9, 1))
    with pytest.raises(ValueError, match=r"^hyperparameter_search would train many times with one pruning; make a Tr"):
        hf.hyperparameter_search()


def test_another_data_set_a_used_pruning_and_a_foreign_checkpoint_are_refused(tmp_path):
    pruning = make(texts())
    with pytest.raises(ValueError, match="has 9 samples and the pruning 48; give both the same data set"):
        PruningTrainer(
            classifier(),
            TrainingArguments(str(tmp_path), num_train_epochs=EPOCHS, use_cpu=True, report_to="none"),
            train_dataset=texts(9),
            pruning=pruning,
            reference_dataset=texts(9, 1),
        )
    hf = trainer(tmp_path, classifier(), pruning, texts(9, 1))
    with pytest.raises(ValueError, match="the batches have no labels; name that column of the data set labels"):
        hf.compute_loss(hf.model, {"input_ids": torch.ones(1, 3), "sample_index": torch.tensor([0])})
    with pytest.raises(ValueError, match="has no checkpoint; leave resume_from_checkpoint out"):
        hf.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-3 holds no pruning.pt: it was saved without pruning"):
        hf.train(resume_from_checkpoint=True)
    pruning.update(torch.tensor([3]), torch.ones(1))
    with pytest.raises(ValueError, match="has been trained with; make a new one, or pass resume_from_checkpoint"):
        hf.train()
