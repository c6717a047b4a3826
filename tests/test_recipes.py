"""Every file of examples/recipes: its commands are understood, and it trains a tiny pipeline of its family."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import is_peft_model
from diffusers import BitsAndBytesConfig, DiffusionPipeline, TorchAoConfig
from safetensors.torch import load_file

from tests import tiny
from tests.conftest import pairs, unpaired
from trl_diffusion.bench.estimate import Mode, published_models, training_memory
from trl_diffusion.cli import dpo, kto, main, rpo
from trl_diffusion.cli.arguments import ModelArguments
from trl_diffusion.cli.bench import make_estimate_parser
from trl_diffusion.cli.data import make_parser as make_data_parser
from trl_diffusion.cli.data import policies_of
from trl_diffusion.cli.launch import Launch
from trl_diffusion.cli.rank import LAUNCHER
from trl_diffusion.losses import contrast_weights
from trl_diffusion.trainer.base_trainer import DiffusionTrainer
from trl_diffusion.trainer.rpo_trainer import OWN_WEIGHT


ROOT = Path(__file__).parents[1]
RECIPES = {file.stem: file for file in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))}
EVERY_RECIPE = pytest.mark.parametrize("name", RECIPES)
METHODS = {"kto": kto, "rpo": rpo, "dpo": dpo}
PIPELINES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny.tiny_stable_diffusion,
    "stabilityai/stable-diffusion-xl-base-1.0": tiny.tiny_stable_diffusion_xl,
    "stabilityai/stable-diffusion-3.5-medium": tiny.tiny_stable_diffusion_3,
    "black-forest-labs/FLUX.1-dev": tiny.tiny_flux,
}
# The denoisers of the estimates, by the same names.
ESTIMATED = {model["source"]: short for short, model in published_models().items()}


def commands(name: str, start: str) -> list[list[str]]:
    """Those of the recipe's comments that start so, as words."""
    lines = re.findall(rf"^# +({start}.*)$", RECIPES[name].read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def method_of(name: str) -> str:
    """The recipe says itself how it is started."""
    (words,) = commands(name, r"trl-diffusion (?!data|bench)")
    assert words[2:] == ["--config", str(RECIPES[name].relative_to(ROOT))]
    return words[1]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """What no test can load from the Hub: pipelines, CLIP, data."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for source, build in PIPELINES.items():
        build().save_pretrained(folder / source)
    tiny.tiny_clip(folder / "clip")
    (folder / "unpaired").mkdir()
    (folder / "pairs").mkdir()
    unpaired(16).to_parquet(folder / "unpaired" / "train.parquet")
    pairs(16).to_parquet(folder / "pairs" / "train.parquet")
    return folder


def overrides(options: dict, method: str, stand_ins: Path, output_dir: Path) -> list[str]:
    """No more than a CPU without the Hub needs; all else is the recipe's."""
    words = ["--use_cpu", "--max_steps", "2", "--resolution", "16", "--output_dir", str(output_dir)]
    words += ["--model_name_or_path", str(stand_ins / options["model_name_or_path"])]
    words += ["--dataset_name", str(stand_ins / ("unpaired" if method == "kto" else "pairs"))]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "1"]
    words += ["--validation_inference_steps", "2"]
    return words + (["--embedding_model", str(stand_ins / "clip")] if method == "rpo" else [])


@EVERY_RECIPE
def test_commands_of_the_comments(name):
    options = yaml.safe_load(RECIPES[name].read_text())
    method = method_of(name)
    converted = commands(name, "trl-diffusion data")
    assert converted
    for words in converted:
        args = make_data_parser().parse_args(words[2:])
        if args.command == "convert":
            policies_of(args)
        layout = getattr(args, "layout", "unpaired" if args.source == "folders" else "paired")
        assert layout == ("unpaired" if method == "kto" else "paired")
    # What the first one writes, or looks at, is what is trained on.
    first = make_data_parser().parse_args(converted[0][2:])
    written = first.output_dir if first.command == "convert" else first.dataset_name
    assert str(written) == options["dataset_name"]


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name.startswith(("sd15_", "sdxl_")) and "lora" not in name]
)
def test_what_the_authors_do_to_images_and_weights(name):
    """Diffusion-DPO's code and Diffusion-KTO's script mirror half of the images and have a weight decay of 0.01."""
    options = yaml.safe_load(RECIPES[name].read_text())
    assert options["random_flip"] is True
    assert options["weight_decay"] == 0.01


@pytest.mark.parametrize("name", [name for name in RECIPES if "rpo" in name])
def test_a_winners_own_loser_keeps_its_weight(name):
    """However many pairs the window of the recipe has."""
    options = yaml.safe_load(RECIPES[name].read_text())
    pairs = options["per_device_train_batch_size"] * options.get("num_processes", 1)
    pairs *= options["gradient_accumulation_steps"] if options["window"] == "step" else 1
    embeddings = torch.randn(2, pairs, 16, generator=torch.Generator().manual_seed(0))
    weights = contrast_weights(*embeddings, temperature=options["temperature"], diagonal=options["diagonal"])
    assert weights.diagonal().mean().item() >= OWN_WEIGHT


@EVERY_RECIPE
def test_recipe_trains(name, stand_ins, tmp_path, monkeypatch):
    """As `trl-diffusion <method> --config <recipe>` does, but in this process."""
    options, method = yaml.safe_load(RECIPES[name].read_text()), method_of(name)
    launched, trainers = [], []

    def start(self, method, words, prog):
        launched.append(self.args)
        monkeypatch.setenv(LAUNCHER, "1")
        monkeypatch.setattr(sys, "argv", ["rank.py", method, *words])
        METHODS[method].main()

    def train(self, *args, **kwargs):
        trainers.append(self)
        return original(self, *args, **kwargs)

    def stand_in(self):
        """bitsandbytes needs a GPU."""
        config = quantization_config(self)
        if config is None:
            return None
        assert isinstance(config, BitsAndBytesConfig)
        assert config.load_in_4bit
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
        return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())

    original, quantization_config = DiffusionTrainer.train, ModelArguments.quantization_config
    monkeypatch.setattr(DiffusionTrainer, "train", train)
    monkeypatch.setattr(ModelArguments, "quantization_config", stand_in)
    monkeypatch.setattr(Launch, "start", start)
    words = overrides(options, method, stand_ins, tmp_path / "out")
    main([method, "--config", str(RECIPES[name]), *words])

    (trainer,) = trainers
    assert [Path(args.config_file).stem for args in launched] == [
        options[name] for name in ("accelerate_config",) if name in options
    ]
    assert [args.num_processes for args in launched] == [
        options[name] for name in ("num_processes",) if name in options
    ]
    for option, value in options.items():
        if f"--{option}" not in words and hasattr(trainer.args, option):
            assert getattr(trainer.args, option) == value, option
    assert is_peft_model(trainer.model) == options.get("use_peft", False)
    assert trainer.family.is_quantized == options.get("load_in_4bit", False)

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all(np.isfinite(entry["loss"]) for entry in logs)
    # The start is exact, in bf16 too.
    assert logs[0]["loss"] == pytest.approx(0.5 if method == "kto" else np.log(2), rel=1e-6)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    if options.get("use_peft"):
        weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
        assert any(".lora_B." in key and weight.any() for key, weight in weights.items())
    else:
        trained = DiffusionPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
        base = DiffusionPipeline.from_pretrained(stand_ins / options["model_name_or_path"]).unet.state_dict()
        assert any(not torch.equal(trained[key], base[key]) for key in base)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, file in RECIPES.items() if "bench --estimate" in file.read_text()])
def test_estimates_of_the_comments(name):
    """The number is the estimate's, and of the recipe's own model, batch and way of training."""
    text, options = RECIPES[name].read_text(), yaml.safe_load(RECIPES[name].read_text())
    (words,) = commands(name, "trl-diffusion bench")
    args = make_estimate_parser().parse_args(words[2:])
    assert args.model == [ESTIMATED[options["model_name_or_path"]]]
    assert args.batch_size == options["per_device_train_batch_size"] * (1 if method_of(name) == "kto" else 2)
    rank = options["lora_r"] if options.get("use_peft") else None
    mode = Mode(rank, options["bf16"], options.get("load_in_4bit", False))
    label, number = re.search(r"^# +((?:full|LoRA).*): least ([\d.]+) GiB$", text, re.MULTILINE).groups()
    assert label == str(mode)
    memory = training_memory(published_models()[args.model[0]], mode, args.batch_size, 0)
    least = memory.total(checkpointing=True, reference=False, cached_features=True) / 2**30
    assert float(number) == pytest.approx(least, abs=0.06)
    if "24 GB" in text:
        assert least < 24e9 / 2**30
        assert options["cache_features"]
        assert options["activation_checkpointing"]


def test_every_recipe_is_in_the_readme():
    text = (ROOT / "examples" / "README.md").read_text()
    assert set(re.findall(r"\(recipes/(\w+)\.yaml\)", text)) == set(RECIPES)
