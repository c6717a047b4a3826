"""The commands as a person types them: in processes of their own where they train."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import unpaired
from tests.tiny import tiny_qwen_image
from trl_diffusion import (
    DiffusionDPOConfig,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    DiffusionRPOConfig,
    DiffusionSFTConfig,
)
from trl_diffusion.cli import COMMANDS, main
from trl_diffusion.cli.generate import make_parser as make_generate_parser
from trl_diffusion.cli.kto import main as script_main
from trl_diffusion.cli.launch import resolve_accelerate_config
from trl_diffusion.cli.training import make_parser


ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
EMOJI = ROOT / "examples" / "emoji"
# Options that only the method has.
CONFIGS = {
    DiffusionKTOConfig: ("--beta", "--desirable_ratio"),
    DiffusionRPOConfig: ("--beta", "--temperature", "--diagonal", "--embedding_model"),
    DiffusionDPOConfig: ("--beta", "--label_smoothing"),
    DiffusionSFTConfig: (),
}
EVERY_CONFIG = pytest.mark.parametrize("config_class", CONFIGS, ids=lambda kind: kind.__name__)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A data set as people store it: `train-*.parquet` and `test-*.parquet` in a folder."""
    folder = tmp_path_factory.mktemp("likes")
    unpaired(12).to_parquet(folder / "train-00000-of-00001.parquet")
    unpaired(4).to_parquet(folder / "test-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command in a process; its caches are its own."""
    home = tmp_path_factory.mktemp("home")

    def run(*command: str, cwd=ROOT, check: bool = True) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets")}
        environment.pop("CI", None)
        result = subprocess.run(
            list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
        )
        if check:
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result

    return run


def kto_options(sd_folder, data_folder, output_dir) -> list[str]:
    options = {
        "model_name_or_path": sd_folder,
        "dataset_name": data_folder,
        "output_dir": output_dir,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
    }
    return ["--use_cpu", *[str(word) for name, value in options.items() for word in (f"--{name}", value)]]


# ---- Help, env, mistakes --------------------------------------------------------------------------------------------


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in ("kto", "rpo", "dpo", "sft", "generate", "env"):
        assert re.search(rf"^ +{name} +\w", text, re.MULTILINE)


@pytest.mark.parametrize(("argv", "message"), [(["ktoo"], "invalid choice: 'ktoo'"), ([], "required: command")])
def test_no_such_command(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: trl-diffusion {command}")


@EVERY_CONFIG
def test_every_option_of_a_method_has_a_help_text(config_class):
    parser = make_parser(config_class, prog="trl-diffusion")
    text = parser.format_help()  # a literal % that is not escaped raises here
    for option in (*CONFIGS[config_class], "--weighting", "--dataset_name", "--lora_alpha", "--validation_prompts"):
        assert re.search(rf"^ +{option}\b", text, re.MULTILINE)
    silent = [action.dest for action in parser._actions if not (action.help or "").strip()]
    ours = {
        name
        for kind in make_parser(config_class).dataclass_types
        for name in kind.__annotations__
        if kind.__module__.startswith("trl_diffusion")
    }
    assert not ours & set(silent)


@EVERY_CONFIG
def test_defaults_of_the_parser_are_the_configurations(tmp_path, config_class):
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    script, training, model = make_parser(config_class).parse_args_and_config(argv)
    expected = config_class(str(tmp_path), use_cpu=True).to_dict()
    different = {name for name, value in training.to_dict().items() if value != expected[name]}
    assert different <= {"logging_dir", "run_name"}
    assert model.peft_config() is None
    assert script.dataset_train_split == "train"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": None}),
        (["--lora_r", "4", "--lora_alpha", "3"], {"r": 4, "lora_alpha": 3}),
        (["--lora_target_modules", "to_q", "to_v"], {"target_modules": {"to_q", "to_v"}}),
        (["--lora_target_modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--use_rslora", "--use_dora"], {"use_rslora": True, "use_dora": True}),
    ],
)
def test_lora_options(tmp_path, options, expected):
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    *_, model = make_parser(DiffusionKTOConfig).parse_args_and_config([*argv, "--use_peft", *options])
    config = model.peft_config()
    assert isinstance(config, LoraConfig)
    for name, value in expected.items():
        assert getattr(config, name) == value


def test_a_single_target_module_trains(sd, tmp_path):
    """One name is a name, as it is for `LoraConfig(target_modules=["to_q"])`."""
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    argv += ["--use_peft", "--lora_target_modules", "to_q"]
    _, training, model = make_parser(DiffusionKTOConfig).parse_args_and_config(argv)
    trainer = DiffusionKTOTrainer(model=sd, args=training, train_dataset=unpaired(), peft_config=model.peft_config())
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("to_q" in name for name in trained)


def test_env(capsys):
    main(["env"])
    lines = dict(re.findall(r"^- (.+?): (.+)$", capsys.readouterr().out, re.MULTILINE))
    assert lines["Python"] == ".".join(map(str, sys.version_info[:3]))
    for package in ("trl-diffusion", "trl", "torch", "transformers", "diffusers", "accelerate", "peft", "datasets"):
        assert lines[package] == version(package)
    assert lines["Accelerator"]
    assert lines["Platform"]


@pytest.mark.slow
def test_the_command_is_installed(run):
    result = run(BIN / "trl-diffusion", "env")
    assert f"- torch: {version('torch')}" in result.stdout
    assert "Found no option '--nonsense'" in run(BIN / "trl-diffusion", "env", "--nonsense", check=False).stderr


# ---- kto ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kto_run(run, sd_folder, data_folder, tmp_path_factory):
    """`trl-diffusion kto`, two steps of full fine-tuning."""
    folder = tmp_path_factory.mktemp("kto") / "tiny-kto"
    result = run(BIN / "trl-diffusion", "kto", *kto_options(sd_folder, data_folder, folder))
    return folder, result.stdout


@pytest.mark.slow
def test_kto_writes_a_trained_pipeline(kto_run, sd_folder, data_folder):
    folder, output = kto_run
    assert f"Model saved to {folder}" in output
    trained = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    base = DiffusionPipeline.from_pretrained(sd_folder).unet.state_dict()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    assert f"| training data | {Path(data_folder).name} |" in card.text


@pytest.mark.slow
def test_kto_is_what_the_trainer_does(kto_run, sd_folder, tmp_path):
    folder, _ = kto_run
    args = DiffusionKTOConfig(
        str(tmp_path),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DiffusionKTOTrainer(model=sd_folder, args=args, train_dataset=unpaired())
    trainer.train()
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.slow
def test_example_under_accelerate_is_the_same(kto_run, run, sd_folder, data_folder, tmp_path):
    options = kto_options(sd_folder, data_folder, tmp_path / "out")
    run(BIN / "accelerate", "launch", "--cpu", "examples/kto.py", *options)
    name = "unet/diffusion_pytorch_model.safetensors"
    weights, expected = load_file(tmp_path / "out" / name), load_file(kto_run[0] / name)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def lora_run(run, sd_folder, data_folder, tmp_path_factory):
    """Options from a file, one of them overridden, launcher's options among them, LoRA, evaluation, samples."""
    folder = tmp_path_factory.mktemp("lora")
    config = {
        "model_name_or_path": sd_folder,
        "dataset_name": data_folder,
        "output_dir": str(folder / "from file"),
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "beta": 123.0,
        "use_peft": True,
        "lora_r": 2,
        "lora_alpha": 8,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "validation_prompts": ["a cat", "a dog"],
        "num_validation_images": 1,
        "validation_inference_steps": 1,
        "num_processes": 1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run(
        *(BIN / "trl-diffusion", "kto", "--config", folder / "config.yaml", "--num_machines", "1"),
        *("--output_dir", folder / "from line", "--lora_alpha", "4", "--max_steps=1"),
    )
    return folder / "from line"


@pytest.mark.slow
def test_kto_with_a_file_of_options(lora_run, sd_folder):
    assert not (lora_run.parent / "from file").exists()
    assert sorted(path.name for path in lora_run.glob("checkpoint-*")) == ["checkpoint-1"]
    assert sorted(path.name for path in lora_run.glob("samples/*")) == ["step-000000.png", "step-000001.png"]
    card = (lora_run / "README.md").read_text()
    assert "| beta | 123 " in card
    assert "eval_loss" in card
    pipeline = DiffusionPipeline.from_pretrained(sd_folder)
    pipeline.load_lora_weights(lora_run)
    (config,) = pipeline.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 4)
    assert any("to_q" in name for name, _ in pipeline.unet.named_parameters() if "lora" in name)


@pytest.mark.slow
def test_kto_names_a_missing_split(run, sd_folder, data_folder, tmp_path):
    options = [*kto_options(sd_folder, data_folder, tmp_path / "out"), "--dataset_train_split", "training"]
    result = run(BIN / "trl-diffusion", "kto", *options, check=False)
    assert result.returncode != 0
    assert re.search("has no split 'training': found .*'train'.*--dataset_train_split", result.stderr)
    assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_evaluation_split_is_missing(sd_folder, data_folder, tmp_path, monkeypatch, capsys):
    options = [*kto_options(sd_folder, data_folder, tmp_path / "out"), "--eval_strategy", "steps"]
    monkeypatch.setattr(sys, "argv", ["kto.py", *options, "--dataset_test_split", "dev"])
    with pytest.raises(SystemExit):
        script_main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"kto\.py: error: .* has no split 'dev': found .*'test'.*--dataset_test_split", error)


def test_mistaken_options_start_no_training(sd_folder, data_folder, tmp_path, refused):
    """Options are checked before the launcher starts the processes."""
    options = kto_options(sd_folder, data_folder, tmp_path / "out")
    assert "`beta` must be positive and finite, found -1.0" in refused("kto", *options, "--beta", "-1")


# ---- rpo, dpo, sft --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "setting"),
    [
        ("rpo", ("--embedding_model", EMOJI / "clip", "--diagonal", "0.3"), "diagonal 0.3, over the batch"),
        ("dpo", ("--loss_type", "ipo", "--beta", "5"), "Diffusion-DPO, loss `ipo`"),
        ("sft", ("--weighting", "min_snr"), "supervised fine-tuning, error weighting `min_snr`"),
    ],
)
def test_the_other_methods_on_the_emoji_data(tmp_path, method, options, setting):
    argv = [
        *(method, "--model_name_or_path", EMOJI / "base"),
        *("--dataset_name", EMOJI / "data", "--dataset_config", "preferences", "--output_dir", tmp_path / "out"),
        *("--max_steps", 2, "--per_device_train_batch_size", 2, "--learning_rate", 1e-4, "--logging_steps", 1),
        *("--report_to", "none", "--use_cpu", "--save_strategy", "no", "--disable_tqdm", "true", *options),
    ]
    main(list(map(str, argv)))
    trained = DiffusionPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    base = DiffusionPipeline.from_pretrained(EMOJI / "base").unet.state_dict()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    card = (tmp_path / "out" / "README.md").read_text()
    assert setting in card
    assert "| steps | 2 |" in card


@pytest.mark.parametrize(("word", "value"), [("0.3", 0.3), ("include", "include"), ("exclude", "exclude")])
def test_diagonal_on_the_command_line(tmp_path, word, value):
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    _, training, _ = make_parser(DiffusionRPOConfig).parse_args_and_config([*argv, "--diagonal", word])
    assert training.diagonal == value
    assert type(training.diagonal) is type(value)


@pytest.mark.parametrize("method", ["rpo", "dpo", "sft"])
def test_mistaken_options_of_the_other_methods(method, tmp_path, refused):
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    assert "`snr_gamma=2.0` belongs to `weighting='min_snr'`" in refused(method, *argv, "--snr_gamma", "2")


# ---- generate -------------------------------------------------------------------------------------------------------


def generate(model, folder, *options: str) -> dict[str, bytes]:
    main(
        [
            "generate",
            *("--model_name_or_path", str(model), "--output_dir", str(folder), "--num_inference_steps", "2"),
            *(options or ("--prompts", "a cat", "a dog", "--num_images_per_prompt", "3")),
        ]
    )
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def outputs(sd_folder, tmp_path_factory):
    """The base, and the outputs of a full and of a LoRA training."""
    folders = {"base": sd_folder}
    for name, peft_config in (("full", None), ("lora", LoraConfig(r=2, lora_alpha=8))):
        folders[name] = str(tmp_path_factory.mktemp(name))
        args = DiffusionKTOConfig(
            folders[name],
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DiffusionKTOTrainer(model=sd_folder, args=args, train_dataset=unpaired(), peft_config=peft_config)
        trainer.train()
        trainer.save_model()
    return folders


@pytest.mark.parametrize("kind", ["base", "full", "lora"])
def test_generate(outputs, tmp_path, kind):
    first = generate(outputs[kind], tmp_path / "first")
    assert sorted(first) == sorted([*(f"{i:04d}-{seed}.png" for i in range(2) for seed in range(3)), "grid.png"])
    assert len(set(first.values())) == 7
    assert Image.open(tmp_path / "first" / "grid.png").width == 3 * (16 + 4) + 4
    assert generate(outputs[kind], tmp_path / "second") == first
    others = [generate(outputs[other], tmp_path / other) for other in {"base", "full", "lora"} - {kind}]
    assert all(other["0000-0.png"] != first["0000-0.png"] for other in others)


def test_generate_draws_what_the_pipeline_draws(outputs, tmp_path):
    generate(outputs["full"], tmp_path, "--prompts", "a dog", "--num_images_per_prompt", "1", "--seed", "9")
    pipeline = DiffusionPipeline.from_pretrained(outputs["full"])
    image = pipeline("a dog", generator=torch.Generator().manual_seed(9), num_inference_steps=2).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "0000-9.png")), np.asarray(image))


def test_generate_seeds_and_guidance(outputs, tmp_path):
    prompts = ("--prompts", "a cat", "a dog")
    every = generate(outputs["base"], tmp_path / "0", *prompts, "--num_images_per_prompt", "3")
    later = generate(outputs["base"], tmp_path / "1", *prompts, "--num_images_per_prompt", "1", "--seed", "2")
    assert sorted(later) == ["0000-2.png", "0001-2.png", "grid.png"]
    for name in ("0000-2.png", "0001-2.png"):
        difference = Image.open(tmp_path / "0" / name), Image.open(tmp_path / "1" / name)
        np.testing.assert_allclose(*(np.asarray(image, int) for image in difference), atol=1)
    guided = generate(
        outputs["base"], tmp_path / "2", *prompts, "--num_images_per_prompt", "3", "--guidance_scale", "1"
    )
    assert guided["0000-0.png"] != every["0000-0.png"]


@pytest.mark.parametrize(("resolution", "size"), [("8", (8, 8)), ("8x24", (24, 8))])
def test_generate_at_a_resolution(outputs, tmp_path, resolution, size):
    options = ("--prompts", "a dog", "--num_images_per_prompt", "1", "--resolution", resolution)
    generate(outputs["lora"], tmp_path, *options)
    assert Image.open(tmp_path / "0000-0.png").size == size


@pytest.mark.parametrize("kind", ["base", "lora"])
def test_generate_refuses_a_resolution_before_it_loads_weights(outputs, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("trl_diffusion.cli.generate.load_trained", lambda *args, **kwargs: pytest.fail("loaded"))
    for resolution, better in (("7", "6 or 8"), ("8x7", "8x6 or 8"), ("0", "2 or 4")):
        with pytest.raises(ValueError, match=f"Found resolution={resolution}, .* multiple of 2 .*: use {better}"):
            generate(outputs[kind], tmp_path, "--prompts", "a dog", "--resolution", resolution)


def test_generate_refuses_what_is_no_size(outputs, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        generate(outputs["base"], tmp_path, "--prompts", "a dog", "--resolution", "8x")
    assert error.value.code == 2
    assert "--resolution: found '8x', expected SIDE such as 512, or HEIGHTxWIDTH" in capsys.readouterr().err


def test_generate_guides_qwen_image(tmp_path):
    tiny_qwen_image().save_pretrained(tmp_path / "qwen")
    options = ("--prompts", "a dog", "--num_images_per_prompt", "1", "--resolution", "16", "--guidance_scale")
    one, four = (generate(tmp_path / "qwen", tmp_path / scale, *options, scale) for scale in ("1", "4"))
    assert one["0000-0.png"] != four["0000-0.png"]


def test_generate_from_a_file_of_prompts(outputs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    options = ("--prompts_file", str(tmp_path / "prompts.txt"), "--num_images_per_prompt", "3")
    assert generate(outputs["base"], tmp_path / "file", *options) == generate(outputs["base"], tmp_path / "line")


def test_every_option_of_generate_has_a_help_text():
    parser = make_generate_parser()
    assert "--guidance_scale" in parser.format_help()
    assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize("options", [["--accelerate_config", "multi_gpu"], ["--accelerate_config=multi_gpu"]])
def test_accelerate_configuration_by_name(options):
    found = resolve_accelerate_config(["--num_processes", "2", *options, "--mixed_precision", "no"])
    assert found[:3] == ["--num_processes", "2", "--config_file"]
    assert yaml.safe_load(Path(found[3]).read_text())["distributed_type"] == "MULTI_GPU"
    assert found[4:] == ["--mixed_precision", "no"]


def test_accelerate_configuration_by_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.touch()
    assert resolve_accelerate_config(["--accelerate_config", str(file)]) == ["--config_file", str(file)]
    assert resolve_accelerate_config(["--num_processes", "2"]) == ["--num_processes", "2"]


@pytest.mark.parametrize("options", [["--accelerate_config", "zero9"], ["--accelerate_config"]])
def test_unknown_accelerate_configuration_is_refused(options):
    with pytest.raises(ValueError, match=r"Found `--accelerate_config .*expected a file or one of \['fsdp2'"):
        resolve_accelerate_config(options)
