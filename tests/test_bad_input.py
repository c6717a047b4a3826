"""Each wrong argument or data set is refused before the first step, in a sentence that says what to do."""

import copy
import io
import math

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, QuantoConfig, UNet2DModel
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments

from tests.conftest import picture, unpaired
from tests.tiny import tiny_stable_diffusion
from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer
from trl_diffusion.hub import load_policy


def config(folder, **changes) -> DiffusionKTOConfig:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return DiffusionKTOConfig(**settings | changes)


@pytest.fixture
def build(tmp_path):
    """Builds a trainer of the tiny pipeline; `changes` are those of its configuration."""

    def build(model=None, train_dataset=..., changes=None, **kwargs):
        return DiffusionKTOTrainer(
            model=tiny_stable_diffusion() if model is None else model,
            args=kwargs.pop("args", None) or config(tmp_path, **(changes or {})),
            train_dataset=unpaired() if train_dataset is ... else train_dataset,
            **kwargs,
        )

    return build


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["to_q", "to_v"]} | changes)


# ---- Data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [("label", "liked", "'liked'"), ("prompt", "caption", "'caption'"), ("image", "jpg", "'jpg'")],
)
def test_misnamed_column(build, old, new, found, streaming):
    dataset = unpaired().rename_column(old, new)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match=f"training data set lacks the column '{old}'.*found.*{found}.*rename_column"):
        build(train_dataset=dataset, changes={"desirable_ratio": None})


def test_missing_columns_are_all_named(build):
    dataset = unpaired().remove_columns(["prompt", "label"])
    with pytest.raises(ValueError, match=r"lacks the columns 'prompt', 'label'.*expected.*'prompt', 'image', 'label'"):
        build(train_dataset=dataset)


def test_pair_without_its_second_half(build):
    dataset = unpaired().rename_column("image", "chosen").remove_columns("label")
    with pytest.raises(ValueError, match=r"lacks the columns 'image', 'label'.*'chosen'"):
        build(train_dataset=dataset)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "feature", "found"),
    [
        (["yes", "no"], Value("string"), "string"),
        ([1.0, 0.0], Value("float32"), "float32"),
        ([1, 0], Value("int64"), "int64"),
        ([None, None], Value("null"), "null"),
    ],
)
def test_label_of_another_type(build, values, feature, found, streaming):
    dataset = unpaired(2).remove_columns("label").add_column("label", values, feature=feature)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    with pytest.raises(
        ValueError, match=rf"'label' of the training data set is .*{found}.*expected bool.*Value\('bool'\)"
    ):
        build(train_dataset=dataset, changes={"desirable_ratio": None})


@pytest.mark.parametrize(("column", "feature"), [("label", Value("bool")), ("prompt", Value("string"))])
def test_none_among_the_values_is_named_by_row(build, column, feature):
    values = unpaired(6)[column][:]
    values[4] = None
    dataset = unpaired(6).remove_columns(column).add_column(column, values, feature=feature)
    with pytest.raises(ValueError, match=f"'{column}' of the training data set is None in row 4.*filter"):
        build(train_dataset=dataset)


def test_none_beyond_the_first_block_of_rows(build):
    """A large set is checked in blocks: the row number counts from the set's start, not from the block's."""
    rows = 100_003
    dataset = Dataset.from_dict(
        {"prompt": ["p"] * rows, "image": [None] * rows, "label": [True] * (rows - 1) + [None]},
        features=Features({"prompt": Value("string"), "image": Image(), "label": Value("bool")}),
    ).remove_columns("image")
    dataset = dataset.add_column("image", [{"bytes": b"", "path": None}] * rows, feature=Image())
    with pytest.raises(ValueError, match=r"'label' of the training data set is None in row 100002"):
        build(train_dataset=dataset)


@pytest.mark.parametrize("column", ["label", "prompt", "image"])
def test_none_in_a_stream_is_named_by_row(build, column):
    def rows():
        for i, row in enumerate(unpaired(8)):
            yield row | ({column: None} if i == 2 else {})

    stream = datasets.IterableDataset.from_generator(rows, features=unpaired(1).features)
    trainer = build(train_dataset=stream, changes={"desirable_ratio": None})
    with pytest.raises(ValueError, match=f"'{column}' is None in row 2, expected"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("values", "feature"),
    [([["a", "cat"], ["a", "dog"]], datasets.List(Value("string"))), ([1, 2], Value("int64"))],
)
def test_prompt_is_not_a_string(build, values, feature):
    dataset = unpaired(2).remove_columns("prompt").add_column("prompt", values, feature=feature)
    with pytest.raises(
        ValueError, match=r"'prompt' of the training data set is .*expected string.*one string per row"
    ):
        build(train_dataset=dataset)


def test_image_column_of_paths(build):
    dataset = unpaired(2).remove_columns("image").add_column("image", ["a.png", "b.png"])
    with pytest.raises(
        ValueError, match=r"'image' of the training data set is .*string.*cast_column\('image', datasets.Image"
    ):
        build(train_dataset=dataset)


def test_weight_of_another_type(build):
    dataset = unpaired(2).add_column("weight", ["high", "low"])
    with pytest.raises(ValueError, match=r"'weight' of the training data set is .*string.*expected float"):
        build(train_dataset=dataset)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("ratio", [0.8, None])
def test_all_labels_equal(build, label, ratio):
    dataset = unpaired().remove_columns("label").add_column("label", [label] * 12)
    with pytest.raises(ValueError, match=f"All 12 labels of the training data set are {label}.*add the other kind"):
        build(train_dataset=dataset, changes={"desirable_ratio": ratio})


def test_evaluation_data_may_have_equal_labels(build):
    dataset = unpaired(4).remove_columns("label").add_column("label", [True] * 4)
    assert math.isfinite(build(eval_dataset=dataset).evaluate()["eval_loss"])


def test_empty_data_set(build):
    with pytest.raises(ValueError, match=r"training data set is empty: expected at least one row"):
        build(train_dataset=unpaired().select([]))


def test_wrong_evaluation_data_is_named(build):
    wrong = unpaired().rename_column("label", "liked")
    with pytest.raises(ValueError, match=r"evaluation data set lacks the column 'label'"):
        build(eval_dataset=wrong)
    with pytest.raises(ValueError, match=r"evaluation data set 'new' lacks the column 'label'"):
        build(eval_dataset={"old": unpaired(), "new": wrong})


def test_data_set_without_a_split_chosen(build):
    with pytest.raises(TypeError, match=r"found DatasetDict: pick a split, for example `dataset\['train'\]`"):
        build(train_dataset=DatasetDict(train=unpaired()))


def test_data_set_is_a_list(build):
    with pytest.raises(TypeError, match=r"must be a `datasets.Dataset`.*found list"):
        build(train_dataset=list(unpaired(2)))


def test_no_data_set(build):
    with pytest.raises(ValueError, match=r"`train_dataset` is required"):
        build(train_dataset=None)


# ---- Image files ----------------------------------------------------------------------------------------------------


def with_broken_file(rows: int, bad: int, broken: bytes) -> Dataset:
    dataset = unpaired(rows)
    files = dataset.cast_column("image", Image(decode=False))["image"][:]
    files[bad] = {"bytes": broken, "path": None}
    return dataset.remove_columns("image").add_column("image", files, feature=Image())


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(0, (64, 64)).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(encoded("png")[:2000], id="truncated png"),
        pytest.param(encoded("jpeg")[:1000], id="truncated jpeg"),
        pytest.param(encoded("png")[:10], id="ten bytes"),
        pytest.param(b"not an image", id="text"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_broken_image_is_named_by_row(build, broken, streaming):
    dataset = with_broken_file(8, 5, broken)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    trainer = build(
        train_dataset=dataset, changes={"desirable_ratio": None, "per_device_train_batch_size": 8, "max_steps": 1}
    )
    with pytest.raises(
        ValueError, match=r"The image in row 5 cannot be read \(.+\): replace the file or drop the row"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_broken_image_is_named_by_row_from_a_worker(build):
    trainer = build(
        train_dataset=with_broken_file(8, 5, encoded("png")[:2000]),
        changes={
            "desirable_ratio": None,
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "dataloader_num_workers": 1,
        },
    )
    with pytest.raises(ValueError, match=r"The image in row 5 cannot be read"):
        trainer.train()


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_image_file_is_named_by_row(build, streaming):
    dataset = unpaired(4)
    files = dataset.cast_column("image", Image(decode=False))["image"][:]
    files[3] = {"bytes": None, "path": "/no/such/file.png"}
    dataset = dataset.remove_columns("image").add_column("image", files, feature=Image())
    if streaming:
        dataset = dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"row 3 cannot be read .*file.png"):
        build(train_dataset=dataset, changes={"desirable_ratio": None}).train()


@pytest.mark.parametrize("streaming", [False, True])
def test_image_without_bytes_and_path_is_named_by_row(build, streaming):
    dataset = unpaired(4)
    files = dataset.cast_column("image", Image(decode=False))["image"][:]
    files[3] = {"bytes": None, "path": None}
    dataset = dataset.remove_columns("image").add_column("image", files, feature=Image())
    if streaming:
        dataset = dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"row 3"):
        build(train_dataset=dataset, changes={"desirable_ratio": None}).train()


# ---- Model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [1, 15, 17])
def test_resolution_not_divisible(build, resolution):
    with pytest.raises(
        ValueError, match=f"resolution={resolution}, expected a multiple of 2 .*: use [0-9]+ or [0-9]+"
    ):
        build(changes={"resolution": resolution})


@pytest.mark.parametrize("resolution", [0, -16])
def test_resolution_not_positive(build, resolution):
    with pytest.raises(ValueError, match=f"resolution={resolution}"):
        build(changes={"resolution": resolution})


def test_peft_config_matches_no_module(build):
    with pytest.raises(ValueError, match=r"does not fit the UNet2DConditionModel.*q_proj.*to_k.*to_v.*good choice"):
        build(peft_config=lora(target_modules=["q_proj"]))


@pytest.mark.parametrize("wrong", [{"r": 4}, "lora", LoraConfig])
def test_peft_config_of_the_wrong_type(build, wrong):
    with pytest.raises(TypeError, match=r"`peft_config` must be a `peft.PeftConfig`, found (dict|str|type)"):
        build(peft_config=wrong)


def test_peft_config_of_a_kind_for_language_models(build):
    with pytest.raises((TypeError, ValueError), match=r"`peft_config`.*UNet2DConditionModel"):
        build(peft_config=PromptTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_adapter_that_changes_the_reference(build, changes):
    """Biases or base weights that PEFT does not give back when the adapter is off would move the reference along."""
    images, generator = torch.randn(2, 4, 8, 8), torch.Generator().manual_seed(0)
    text = torch.randn(2, 3, 16, generator=generator)
    with torch.no_grad():
        expected = tiny_stable_diffusion().unet.eval()(images, 7, text).sample
    try:
        trainer = build(peft_config=lora(**changes), changes={"learning_rate": 0.1})
    except ValueError as error:
        assert next(iter(changes)) in str(error)  # noqa: PT017
        return
    trainer.train()
    with torch.no_grad(), trainer.reference.policy(trainer.model.eval()) as reference:
        torch.testing.assert_close(reference(images, 7, text).sample, expected, rtol=0, atol=1e-5)


def test_folder_is_no_pipeline(build, tmp_path):
    with pytest.raises(ValueError, match=r"is no diffusers pipeline: found no model_index.json.*expected"):
        build(model=str(tmp_path))


def test_folder_does_not_exist(build, tmp_path):
    with pytest.raises((ValueError, OSError), match=r"nowhere"):
        build(model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("as_folder", [False, True])
def test_unknown_family(build, tmp_path, as_folder):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    model = DDPMPipeline(unet, DDPMScheduler())
    if as_folder:
        model.save_pretrained(tmp_path / "ddpm")
        model = str(tmp_path / "ddpm")
    with pytest.raises(
        ValueError, match=r"class DDPMPipeline, which no family handles; expected one of.*StableDiffusionPipeline"
    ):
        build(model=model)


def test_inpainting_unet(build, sd):
    sd.unet = type(sd.unet).from_config(sd.unet.config, in_channels=9)
    with pytest.raises(ValueError, match=r"9 input channels over a VAE with 4: expected a text-to-image UNet"):
        build(model=sd)


def test_scheduler_of_another_kind(build, sd):
    sd.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"Found FlowMatchEulerDiscreteScheduler.*expected a DDPM-like scheduler"):
        build(model=sd)


def test_bare_denoiser_without_its_pipeline(build, sd):
    with pytest.raises(ValueError, match=r"bare UNet2DConditionModel, so `processing_class` must be.*found NoneType"):
        build(model=sd.unet)


def test_bare_denoiser_with_a_tokenizer(build, sd):
    with pytest.raises(ValueError, match=r"`processing_class` must be the rest of its pipeline; found CLIPTokenizer"):
        build(model=sd.unet, processing_class=sd.tokenizer)


def test_bare_module_that_is_no_denoiser_of_the_pipeline(build, sd):
    with pytest.raises(ValueError, match=r"Found a AutoencoderKL for a StableDiffusionPipeline, expected a UNet2D"):
        build(model=sd.vae, processing_class=sd)


def test_peft_model(build, sd):
    with pytest.raises(TypeError, match=r"found PeftModel: pass the model that it wraps, and a `peft_config`"):
        build(model=get_peft_model(sd.unet, lora()))


@pytest.mark.parametrize("model", [42, torch.nn.Linear(1, 1)])
def test_model_of_another_type(build, model):
    with pytest.raises(TypeError, match=r"`model` must be a Hub id, a folder.*found (int|Linear)"):
        build(model=model)


def test_processing_class_with_a_pipeline(build, sd, sd_folder):
    for model in (sd, sd_folder):
        with pytest.raises(ValueError, match=r"`processing_class` belongs to a bare denoiser.*drop it"):
            build(model=model, processing_class=tiny_stable_diffusion())


def test_init_kwargs_with_a_pipeline(build):
    with pytest.raises(
        ValueError, match=r"`model_init_kwargs` only apply.*found an instantiated StableDiffusionPipeline"
    ):
        build(changes={"model_init_kwargs": {"dtype": "float32"}})


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("bare", [False, True])
def test_reference_is_the_model(build, sd, peft_config, bare):
    model = {"model": sd.unet, "processing_class": sd} if bare else {"model": sd}
    with pytest.raises(ValueError, match=r"`model` and `ref_model` are the same object: omit `ref_model`"):
        build(**model, ref_model=sd.unet, peft_config=peft_config)


def test_reference_of_another_class(build, sd):
    with pytest.raises(TypeError, match=r"`ref_model` must be a UNet2DConditionModel, found AutoencoderKL"):
        build(ref_model=sd.vae)
    with pytest.raises(TypeError, match=r"`ref_model` must be a UNet2DConditionModel, found StableDiffusionPipeline"):
        build(ref_model=sd)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights(build, sd_folder, dtype):
    with pytest.raises(ValueError, match=f"torch.{dtype} weights for full fine-tuning.*float32.*`bf16=True`"):
        build(model=sd_folder, changes={"model_init_kwargs": {"dtype": dtype}})


def test_pipeline_that_already_carries_lora(build, sd, tmp_path):
    sd.unet.add_adapter(lora())
    for peft_config in (None, lora()):
        with pytest.raises(ValueError, match=r"already carries LoRA weights.*fuse_lora\(\).*unload_lora_weights"):
            build(model=sd, peft_config=peft_config)


def test_reentrant_checkpointing_with_lora(build):
    with pytest.raises(ValueError, match=r"Reentrant checkpointing loses the gradient.*`use_reentrant=True`"):
        build(
            peft_config=lora(),
            changes={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        )


def test_args_of_another_class(build, tmp_path):
    with pytest.raises(TypeError, match=r"`args` must be a DiffusionKTOConfig, found TrainingArguments"):
        build(args=TrainingArguments(str(tmp_path), use_cpu=True))


def test_quantization_config(build):
    config = QuantoConfig("int8")
    with pytest.raises(ValueError, match=r"Found `quantization_config` without `peft_config`: .* pass a `LoraConfig`"):
        build(quantization_config=config)
    with pytest.raises(ValueError, match=r"for a model that is loaded here; found an instantiated StableDiffusionPip"):
        build(quantization_config=config, peft_config=lora())
    with pytest.raises(TypeError, match=r"`quantization_config` is a builtins.dict, expected one of diffusers"):
        build(quantization_config={"load_in_4bit": True}, peft_config=lora(), model="a/b")
    with pytest.raises(ValueError, match=r"as an argument and in `model_init_kwargs`, expected one of them"):
        build(
            quantization_config=config,
            peft_config=lora(),
            model="a/b",
            changes={"model_init_kwargs": {"quantization_config": config}},
        )


# ---- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({"beta": beta}, f"`beta` must be .*positive.*found {beta}.*5000") for beta in (0.0, -1.0, math.nan)],
        ({"beta": math.inf}, "`beta`.*found inf"),
        *[
            ({"desirable_ratio": r}, rf"`desirable_ratio` must be in \(0, 1\], found {r}")
            for r in (0, -0.1, 1.1, math.nan)
        ],
        ({"utility": "prospect"}, "`utility` must be one of .*'risk_seeking'.*found 'prospect'"),
        ({"loss_type": "dpo"}, "`loss_type` must be one of .*'apo_zero_unpaired'.*found 'dpo'"),
        ({"reference_point": "mean"}, "`reference_point` must be one of .*'mismatched'.*found 'mean'"),
        ({"window": "world"}, "`window` must be one of .*'device'.*found 'world'"),
        ({"desirable_weight": -1.0}, "`desirable_weight` must not be negative.*found -1.0"),
        ({"undesirable_weight": -0.5}, "`undesirable_weight` must not be negative.*found -0.5"),
        ({"desirable_weight": math.nan}, "`desirable_weight`.*found nan"),
        ({"loss_type": "apo_zero_unpaired", "utility": "loss_averse"}, "'loss_averse'.*belongs to `loss_type='kto'`"),
        ({"train_sampling_strategy": "sequential"}, "'sequential'.*contradicts a `desirable_ratio`"),
        ({"proportion_empty_prompts": 1.5}, r"`proportion_empty_prompts` must be in \[0, 1\], found 1.5"),
        ({"validation_steps": 0}, "`validation_steps` must be at least 1, found 0"),
        ({"num_validation_images": 0}, "`num_validation_images` must be at least 1, found 0"),
        ({"validation_inference_steps": 0}, "`validation_inference_steps` must be at least 1, found 0"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` has no meaning"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` has no meaning"),
        ({"use_liger_kernel": True}, "`use_liger_kernel` has no meaning"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` has no meaning"),
        ({"batch_eval_metrics": True}, "`batch_eval_metrics` has no meaning"),
        ({"include_num_input_tokens_seen": "all"}, "`include_num_input_tokens_seen` has no meaning"),
        ({"fp16_full_eval": True}, "`fp16_full_eval` has no meaning.*under autocast"),
        ({"bf16_full_eval": True}, "`bf16_full_eval` has no meaning.*under autocast"),
        ({"accelerator_config": {"split_batches": True}}, "`accelerator_config.split_batches` has no meaning"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_setting_out_of_range(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_one_string_of_validation_prompts(tmp_path):
    """Taken for a list of prompts, it would draw one row per letter."""
    with pytest.raises((TypeError, ValueError), match=r"`validation_prompts`.*list.*found"):
        config(tmp_path, validation_prompts="a cat")


@pytest.mark.parametrize(
    ("reference_point", "message"),
    [
        (
            "matched",
            "a mean over a window of one image.*`per_device_train_batch_size` to at least 2.*apo_zero_unpaired",
        ),
        ("mismatched", "`reference_point='mismatched'`.*found per_device_train_batch_size=1, expected at least 2"),
    ],
)
@pytest.mark.parametrize("window", ["batch", "device"])
def test_batch_of_one_has_no_reference_point(build, reference_point, message, window):
    with pytest.raises(ValueError, match=message):
        build(changes={"per_device_train_batch_size": 1, "reference_point": reference_point, "window": window})


@pytest.mark.parametrize("changes", [{"loss_type": "apo_zero_unpaired"}, {"reference_point": "none"}])
def test_batch_of_one_trains_without_a_reference_point(build, changes):
    trainer = build(changes={"per_device_train_batch_size": 1, **changes})
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1, "desirable_ratio": None}, "has no length: set `max_steps`"),
        ({"desirable_ratio": 0.8}, "`desirable_ratio=0.8` needs all labels.*set `desirable_ratio=None`"),
        ({"dataloader_num_workers": 1, "desirable_ratio": None}, "dataloader_num_workers=1.*set it to 0"),
        (
            {"accelerator_config": {"dispatch_batches": True}, "desirable_ratio": None},
            "`dispatch_batches=True` is not supported with streaming",
        ),
    ],
)
def test_streaming_settings(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build(train_dataset=unpaired().to_iterable_dataset(), changes=changes)


def test_inductor_on_a_cpu(build):
    """torch 2.13 gives some convolutions of a UNet no gradient there."""
    with pytest.raises(ValueError, match=r"wrong gradients of UNets on a CPU.*aot_eager"):
        build(changes={"torch_compile": True})


@pytest.mark.parametrize(
    "setting", [{"utility": "loss_averse"}, {"reference_point": "mismatched"}, {"window": "device"}], ids=str
)
def test_apo_refuses_what_it_would_ignore(build, setting):
    with pytest.raises(ValueError, match=r"belongs to `loss_type='kto'`: found loss_type='apo_zero_unpaired'"):
        build(changes={"loss_type": "apo_zero_unpaired", **setting})


def test_remove_unused_columns_is_refused(build):
    with pytest.raises(ValueError, match="`remove_unused_columns` has no meaning"):
        build(changes={"remove_unused_columns": True})


def test_fewer_rows_than_a_step_with_drop_last(build):
    trainer = build(train_dataset=unpaired(3), changes={"dataloader_drop_last": True})
    with pytest.raises(ValueError, match=r"Found 3 training rows, fewer than the 4.*`dataloader_drop_last=True`"):
        trainer.train()


# ---- A loss that is not finite --------------------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Makes one trained weight infinite before step `step`, once."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.step = None
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = math.inf


@pytest.mark.parametrize("logging_steps", [1, 100], ids=["noticed at a log", "noticed at a checkpoint"])
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_non_finite_loss_stops_the_run(build, tmp_path, peft_config, logging_steps):
    trainer = build(
        peft_config=copy.deepcopy(peft_config),
        changes={"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": logging_steps},
        callbacks=[Poison(step=3)],
    )
    with pytest.raises(FloatingPointError, match=r"stopped being finite at step 3: lower `learning_rate` or `beta`"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*point*")] == ["checkpoint-2"]
    load_policy(trainer.model, trainer.family, tmp_path / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_non_finite_loss_is_noticed_at_the_end(build):
    trainer = build(changes={"max_steps": 3, "logging_strategy": "no"}, callbacks=[Poison(step=3)])
    with pytest.raises(FloatingPointError, match=r"at step 3"):
        trainer.train()


def test_non_finite_loss_of_a_micro_batch(build):
    """The first step that is not finite is named, though it is noticed two steps later."""
    trainer = build(
        changes={"max_steps": 4, "logging_steps": 4, "gradient_accumulation_steps": 2}, callbacks=[Poison(step=2)]
    )
    with pytest.raises(FloatingPointError, match=r"at step 2"):
        trainer.train()


def test_a_learning_rate_that_explodes(build):
    with pytest.raises(FloatingPointError, match=r"at step 2"):
        build(changes={"learning_rate": 1e30, "max_steps": 3}).train()


def test_training_resumes_from_the_last_good_checkpoint(build, tmp_path):
    """The same trainer can go on from the checkpoint: nothing of the failed attempt is left in it."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = build(changes=changes, callbacks=[Poison(step=3)])
    with pytest.raises(FloatingPointError):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    logs = [value for entry in trainer.state.log_history for value in entry.values()]
    assert all(math.isfinite(value) for value in logs if isinstance(value, float))


def test_fsdp_without_accelerators_is_refused(build, monkeypatch):
    """accelerate would train with DDP, without a word; this is how its launcher asks for FSDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"Found FSDP with 1 process\(es\) on cpu, where accelerate shards nothing"):
        build()
