"""The trainer's arithmetic: exact start, exact resume, equal results for any split, every option that trains."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig
from transformers import TrainerCallback

from tests.conftest import picture, unpaired
from tests.tiny import tiny_stable_diffusion
from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer
from trl_diffusion.data.draws import Draws, ExampleKey
from trl_diffusion.data.samplers import DesirableRatioSampler


LORA = LoraConfig(r=4, lora_alpha=8)
BOTH = pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])


def config(tmp_path, **kwargs) -> DiffusionKTOConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        # Mild enough for a random model to stay off the flat ends of the sigmoid, where all losses look alike.
        "learning_rate": 1e-4,
        "beta": 100.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DiffusionKTOConfig(str(tmp_path), **(defaults | kwargs))


def trainer_of(tmp_path, dataset=None, peft_config=None, pipeline=None, callbacks=None, eval_dataset=None, **kwargs):
    return DiffusionKTOTrainer(
        model=pipeline or tiny_stable_diffusion(),
        args=config(tmp_path, **kwargs),
        train_dataset=unpaired() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        peft_config=copy.deepcopy(peft_config),
        callbacks=callbacks,
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


# ---- The start --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_first_loss_is_exactly_one_half(tmp_path, peft_config, prediction_type):
    """Policy and reference are the same at step 0, dropout or not: every log-ratio is 0.0 and the loss lambda / 2."""
    pipeline = tiny_stable_diffusion(prediction_type)
    trainer = trainer_of(tmp_path, peft_config=peft_config, pipeline=pipeline, max_steps=1)
    trainer.train()
    assert losses(trainer) == [0.5]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"):
        assert logged(trainer, name) == [0.0]
    assert logged(trainer, "errors/chosen") == logged(trainer, "ref_errors/chosen")


@BOTH
def test_first_loss_is_exactly_one_half_under_autocast(tmp_path, peft_config):
    trainer = trainer_of(tmp_path, peft_config=peft_config, max_steps=1, bf16=True)
    trainer.train()
    assert losses(trainer) == [0.5]
    assert all(p.dtype == torch.float32 for p in weights(trainer).values())


def test_another_reference_is_used(tmp_path):
    other = tiny_stable_diffusion(seed=1).unet
    trainer = DiffusionKTOTrainer(
        model=tiny_stable_diffusion(), ref_model=other, args=config(tmp_path, max_steps=1), train_dataset=unpaired()
    )
    trainer.train()
    assert logged(trainer, "ref_errors/chosen") != logged(trainer, "errors/chosen")
    assert not any(p.requires_grad for p in other.parameters())


def test_the_reference_stays_frozen_while_the_policy_moves(tmp_path):
    pipeline = tiny_stable_diffusion()
    start = {name: p.detach().clone() for name, p in pipeline.unet.named_parameters()}
    trainer = trainer_of(tmp_path, pipeline=pipeline)
    trainer.train()
    assert_equal(start, dict(trainer.reference.model.named_parameters()))
    moved = [name for name, p in pipeline.unet.named_parameters() if not torch.equal(p, start[name])]
    # Not all: GroupNorm makes some biases immaterial.
    assert len(moved) > 0.9 * len(start)


def test_loss_equals_an_independent_computation(tmp_path):
    """One step written out from the paper with diffusers' own scheduler and encoders, for a policy that has moved."""
    torch.manual_seed(0)
    pipeline, reference = tiny_stable_diffusion(), tiny_stable_diffusion()
    with torch.no_grad():
        for p in pipeline.unet.parameters():
            p.add_(0.01 * torch.randn_like(p))
    data = unpaired(4)
    trainer = DiffusionKTOTrainer(
        model=pipeline,
        ref_model=reference.unet,
        args=config(
            tmp_path,
            max_steps=1,
            desirable_ratio=None,
            train_sampling_strategy="sequential",
            proportion_empty_prompts=0.0,
            beta=50.0,
            desirable_weight=1.5,
            learning_rate=0.0,
        ),
        train_dataset=data,
    )
    trainer.train()

    log_ratios, signs = [], []
    for row, example in enumerate(data):
        draws = Draws(42, ExampleKey(row, visit=0))
        pixels = torch.from_numpy(np.array(example["image"])).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = pipeline.vae.encode(pixels.float()).latent_dist
        latent = (posterior.mean + posterior.std * draws.normal("posterior", (1, 4, 8, 8))) * 0.18215
        noise = draws.normal("noise", (4, 8, 8))[None]
        t = torch.tensor([int(draws.uniform("timestep") * 1000)])
        x_t = pipeline.scheduler.add_noise(latent, noise, t)
        tokens = pipeline.tokenizer(
            [example["prompt"]], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
        )
        text = pipeline.text_encoder(tokens.input_ids)[0]
        with torch.no_grad():
            e_theta, e_ref = (
                ((unet(x_t, t, text).sample - noise) ** 2).mean().item() for unet in (pipeline.unet, reference.unet)
            )
        log_ratios.append(e_ref - e_theta)
        signs.append(1 if example["label"] else -1)
    z = max(0.0, sum(log_ratios) / 4)
    expected = [
        (1.5 if s > 0 else 1.0) * (1 - 1 / (1 + math.exp(-s * 50 * (r - z))))
        for r, s in zip(log_ratios, signs, strict=True)
    ]
    assert losses(trainer)[0] == pytest.approx(sum(expected) / 4, abs=1e-5)
    assert logged(trainer, "kl")[0] == pytest.approx(z, abs=1e-6)


# ---- Splits and resume ------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 8, "dataloader_num_workers": 2},
    ],
    ids=["accumulated", "two workers"],
)
def test_losses_do_not_depend_on_how_a_step_is_split(tmp_path, peft_config, split):
    """`reference_point="none"`, because a reference point over the micro-batch depends on the micro-batch."""
    common = {"reference_point": "none", "optim": "sgd", "max_steps": 3, "random_flip": True}
    whole = trainer_of(tmp_path, peft_config=peft_config, per_device_train_batch_size=8, **common)
    parts = trainer_of(tmp_path, peft_config=peft_config, **(common | split))
    whole.train()
    parts.train()
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=0, atol=1e-5)
    for (name, one), two in zip(weights(whole).items(), weights(parts).values(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5, msg=name)


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "dataloader_num_workers": 1},
        {"reference_point": "mismatched", "desirable_ratio": None, "random_flip": True, "center_crop": False},
        {"gradient_checkpointing": False, "bf16": True, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ],
    ids=["default", "accumulation and worker", "mismatched and augmented", "bf16"],
)
def test_resume_is_bit_for_bit(tmp_path, peft_config, options):
    """From a checkpoint in the middle of an epoch and from one at the end of an epoch (12 rows, 3 steps an epoch)."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, **options}
    whole = trainer_of(tmp_path / "whole", peft_config=peft_config, **options)
    whole.train()
    for step in (2, 3, 5):
        resumed = trainer_of(tmp_path / f"resumed-{step}", peft_config=peft_config, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole)
        assert_equal(weights(resumed), weights(whole))


def test_resume_of_a_stream_is_bit_for_bit(tmp_path):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "desirable_ratio": None}
    stream = unpaired(32).to_iterable_dataset()
    whole = trainer_of(tmp_path / "whole", dataset=stream, **options)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", dataset=stream, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(losses(whole)) == 5
    assert losses(resumed) == losses(whole)
    assert_equal(weights(resumed), weights(whole))


def test_a_stream_equals_the_map_style_data_set(tmp_path):
    options = {"max_steps": 3, "desirable_ratio": None, "train_sampling_strategy": "sequential"}
    mapped = trainer_of(tmp_path / "map", **options)
    streamed = trainer_of(tmp_path / "stream", dataset=unpaired().to_iterable_dataset(), **options)
    mapped.train()
    streamed.train()
    assert losses(streamed) == losses(mapped)


def test_two_equal_runs_are_equal_and_another_seed_is_not(tmp_path):
    one, two, other = (trainer_of(tmp_path, seed=seed, max_steps=3) for seed in (1, 1, 2))
    for trainer in (one, two, other):
        trainer.train()
    assert losses(one) == losses(two)
    assert_equal(weights(one), weights(two))
    assert losses(one)[1:] != losses(other)[1:]


# ---- Options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"utility": "loss_averse"},
        {"utility": "risk_seeking"},
        {"loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 1},
        {"reference_point": "mismatched"},
        {"reference_point": "none"},
        {"window": "device"},
        {"desirable_weight": 2.0, "undesirable_weight": 0.5},
        {"desirable_ratio": 1.0},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"disable_dropout": False},
        {"full_determinism": True},
    ],
    ids=str,
)
@BOTH
def test_every_option_trains(tmp_path, peft_config, options):
    trainer = trainer_of(tmp_path, peft_config=peft_config, max_steps=2, **options)
    start = weights(trainer)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert any(not torch.equal(p, start[name]) for name, p in weights(trainer).items())


def test_gradient_checkpointing_computes_the_same(tmp_path):
    with_it = trainer_of(tmp_path, gradient_checkpointing=True)
    without = trainer_of(tmp_path, gradient_checkpointing=False)
    with_it.train()
    without.train()
    assert with_it.pipeline.unet.is_gradient_checkpointing
    assert not without.pipeline.unet.is_gradient_checkpointing
    np.testing.assert_allclose(losses(with_it), losses(without), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@BOTH
def test_torch_compile(tmp_path, peft_config, backend):
    """Policy and reference are both compiled, so that the start is still exact."""
    eager = trainer_of(tmp_path, peft_config=peft_config, max_steps=3, gradient_checkpointing=False)
    compiled = trainer_of(
        tmp_path,
        peft_config=peft_config,
        max_steps=3,
        gradient_checkpointing=False,
        torch_compile=True,
        torch_compile_backend=backend,
        save_strategy="steps",
        save_steps=2,
    )
    eager.train()
    compiled.train()
    assert losses(compiled)[0] == 0.5
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=0, atol=1e-4)
    resumed = trainer_of(tmp_path / "resumed", peft_config=peft_config, max_steps=3, gradient_checkpointing=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    np.testing.assert_allclose(losses(resumed), losses(compiled), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(r=2, target_modules="all-linear"),
        LoraConfig(r=2, use_rslora=True, target_modules=["to_q", "conv1"]),
        LoraConfig(r=2, use_dora=True, target_modules=["to_q"]),
        LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"]),
        LoHaConfig(r=2, target_modules=["to_q"]),
    ],
    ids=["all-linear", "rslora", "dora", "modules_to_save", "loha"],
)
def test_peft_configurations(tmp_path, peft_config):
    trainer = trainer_of(tmp_path, peft_config=peft_config, max_steps=3, save_strategy="steps", save_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.5, abs=1e-4)  # DoRA's start is not exact to the last bit
    assert losses(trainer)[1] != losses(trainer)[0]
    resumed = trainer_of(tmp_path / "resumed", peft_config=peft_config, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(trainer)
    assert_equal(weights(resumed), weights(trainer))


@pytest.mark.parametrize(
    ("weights_of_labels", "reward", "sign"),
    [({"undesirable_weight": 0.0}, "rewards/chosen", 1), ({"desirable_weight": 0.0}, "rewards/rejected", -1)],
    ids=["liked", "disliked"],
)
def test_training_moves_the_rewards_to_where_the_labels_want_them(tmp_path, weights_of_labels, reward, sign):
    data = unpaired(6)
    trainer = trainer_of(
        tmp_path,
        dataset=data,
        eval_dataset=data,
        per_device_train_batch_size=6,
        desirable_ratio=0.5,
        reference_point="none",
        max_steps=10,
        learning_rate=3e-4,
        beta=20.0,
        **weights_of_labels,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before[f"eval_{reward}"] == 0.0
    assert sign * after[f"eval_{reward}"] > 1.0
    assert after["eval_loss"] < before["eval_loss"] / 2


def test_model_forms_are_equivalent(tmp_path, sd_folder):
    """Folder, pipeline, and bare denoiser with the rest of the pipeline."""
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(sd_folder)
    rest = StableDiffusionPipeline.from_pretrained(sd_folder, unet=None)
    forms = [
        {"model": sd_folder},
        {"model": StableDiffusionPipeline.from_pretrained(sd_folder)},
        {"model": loaded.unet, "processing_class": rest},
    ]
    results = []
    for form in forms:
        trainer = DiffusionKTOTrainer(**form, args=config(tmp_path, max_steps=2), train_dataset=unpaired())
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == results[1] == results[2]


def test_paired_data_is_unpaired(tmp_path):
    from datasets import Dataset, Features, Image, Value

    pairs = Dataset.from_dict(
        {
            "prompt": [f"picture {i}" for i in range(4)],
            "chosen": [picture(i) for i in range(4)],
            "rejected": [picture(10 + i) for i in range(4)],
        },
        features=Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()}),
    )
    trainer = trainer_of(tmp_path, dataset=pairs, max_steps=1, eval_dataset=pairs)
    trainer.train()
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 8
    assert losses(trainer) == [0.5]


def test_row_weights_scale_the_loss(tmp_path):
    data = unpaired(4)
    trainer = trainer_of(tmp_path, dataset=data.add_column("weight", [2.0, 2.0, 2.0, 2.0]), max_steps=1)
    trainer.train()
    assert losses(trainer) == [1.0]


def test_liked_share_of_a_run(tmp_path):
    trainer = trainer_of(tmp_path, dataset=unpaired(40), desirable_ratio=0.8)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, DesirableRatioSampler)
    labels = unpaired(40).with_format("numpy")["label"][:]
    assert 0.6 <= np.mean([labels[key.row] for key in sampler]) <= 0.95


# ---- Evaluation -------------------------------------------------------------------------------------------------


def test_evaluation_is_fixed_and_does_not_depend_on_the_batch_size(tmp_path):
    held_out = unpaired(7)
    results = []
    for batch_size in (1, 3, 8):
        trainer = trainer_of(
            tmp_path, eval_dataset=held_out, per_device_eval_batch_size=batch_size, max_steps=2, learning_rate=1e-4
        )
        trainer.train()
        one, two = trainer.evaluate(), trainer.evaluate()
        names = [name for name in one if "runtime" not in name and "per_second" not in name and "time" not in name]
        assert {name: one[name] for name in names} == {name: two[name] for name in names}
        results.append([one[name] for name in names])
    # The random numbers are the same; what differs is the rounding of convolutions over batches of another size.
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(results[2], results[0], rtol=1e-4, atol=1e-3)


def test_evaluation_during_training_of_several_sets(tmp_path):
    sets = {"one": unpaired(4), "two": unpaired(6)}
    trainer = trainer_of(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.train()
    assert len(logged(trainer, "eval_one_loss")) == len(logged(trainer, "eval_two_loss")) == 5
    assert logged(trainer, "eval_one_loss")[0] == 0.5
    assert logged(trainer, "eval_one_loss")[-1] != 0.5
    direct = trainer.evaluate(unpaired(4), metric_key_prefix="test")
    assert direct["test_loss"] == logged(trainer, "eval_one_loss")[-1]


def test_evaluation_does_not_change_the_training(tmp_path):
    with_it = trainer_of(tmp_path, eval_dataset=unpaired(5), eval_strategy="steps", eval_steps=1)
    without = trainer_of(tmp_path)
    with_it.train()
    without.train()
    assert losses(with_it) == losses(without)
    assert_equal(weights(with_it), weights(without))


def test_a_stream_can_be_evaluated(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=unpaired(6).to_iterable_dataset(), per_device_eval_batch_size=3)
    mapped = trainer_of(tmp_path, eval_dataset=unpaired(6), per_device_eval_batch_size=3)
    assert trainer.evaluate()["eval_errors/chosen"] == mapped.evaluate()["eval_errors/chosen"]


# ---- Metrics ----------------------------------------------------------------------------------------------------


def test_logged_metrics_are_means_over_all_images_since_the_last_log(tmp_path):
    every, rarely = (trainer_of(tmp_path, max_steps=4, logging_steps=n) for n in (1, 4))
    every.train()
    rarely.train()
    # Shares of liked images differ from step to step, so that a mean of means would be another number.
    sampler = every._get_train_sampler()
    keys = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        keys += list(sampler)
    labels = np.array([unpaired()[key.row]["label"] for key in keys[:16]]).reshape(4, 4)
    counts = labels.sum(1)
    by_step = {e["step"]: e.get("errors/chosen", 0.0) for e in every.state.log_history if "loss" in e}
    expected = sum(by_step[i + 1] * counts[i] for i in range(4)) / counts.sum()
    assert logged(rarely, "errors/chosen") == [pytest.approx(expected, rel=1e-6)]
    entry = rarely.state.log_history[0]
    assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"])
    assert entry["rewards/chosen"] == pytest.approx(
        100 * (entry["ref_errors/chosen"] - entry["errors/chosen"]), rel=0.01
    )
    assert entry["logps/chosen"] == -entry["errors/chosen"]


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": False}, {"activation_checkpointing": False}], ids=str
)
def test_no_configuration_warns_of_an_old_name(tmp_path, recwarn, options):
    """TRL's configuration sets transformers' deprecated `gradient_checkpointing` for everybody."""
    args = DiffusionKTOConfig(str(tmp_path), use_cpu=True, **options)
    assert args.activation_checkpointing == args.gradient_checkpointing == (not options)
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]
