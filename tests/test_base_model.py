"""The base model of an adapter is found from wherever it is asked for, or named in the error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from PIL import Image

from tests.conftest import unpaired
from tests.tiny import tiny_flux, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_stable_diffusion_xl
from trl_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
from trl_diffusion.cli import main
from trl_diffusion.export import export_lora, export_merged, load_merged
from trl_diffusion.families.stable_diffusion import StableDiffusion
from trl_diffusion.hub import load_trained, save_policy


IMAGES = ["--num_images_per_prompt", "1", "--num_inference_steps", "1"]
SCORING = ["--prompts_file", "prompts.txt", "--scorers", "scorer:score"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`run`: an adapter trained from a base that was given by a relative path; `base`: the base."""
    root = tmp_path_factory.mktemp("place")
    tiny_stable_diffusion().save_pretrained(root / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        args = DiffusionSFTConfig("run", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
        trainer = DiffusionSFTTrainer(
            model="base",
            args=args,
            train_dataset=unpaired(8).remove_columns("label"),
            peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False),
        )
        trainer.save_model()
    return root


@pytest.fixture
def moved(place, tmp_path):
    """The same, after the base has gone to another place."""
    shutil.copytree(place / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "run"


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {name.replace("default_0", "default"): tensor for name, tensor in pipeline.unet.state_dict().items()}


def assert_same(a, b) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_relative_base_is_found_from_elsewhere(place, tmp_path, monkeypatch):
    config = json.loads((place / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base")
    monkeypatch.chdir(tmp_path)
    assert load_trained(str(place / "run")).unet.peft_config
    export_lora(place / "run", "lora.safetensors")
    export_merged(place / "run", "merged.safetensors", single_file=True)
    (tmp_path / "further").mkdir()
    monkeypatch.chdir(tmp_path / "further")
    for name in ("../lora.safetensors", "../merged.safetensors"):
        load_trained(name)


def test_a_relative_base_of_an_exported_file(place, tmp_path, monkeypatch):
    """Also where the folder that is exported is given by a relative path, and is its own base."""
    monkeypatch.chdir(place)
    export_merged("base", tmp_path / "base.safetensors", single_file=True)
    monkeypatch.chdir(tmp_path)
    load_trained("base.safetensors")


def test_another_place_of_the_base(place, moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_trained, load_merged):
        with pytest.raises(
            ValueError, match=r"Found no base model '.*gone', on which '.*run' was trained, .*: pass .*--base"
        ):
            load(str(moved))
        assert_same(load(str(moved), str(place / "base")), load(str(place / "run")))
    base = ["--base_model", str(place / "base")]
    model = ["--model_name_or_path", str(moved)]
    main(["export", *model, *base, "--layout", "comfyui", "--output", "lora.safetensors"])
    main(["generate", *model, *base, "--prompts", "a cat", "--output_dir", "images", *IMAGES])
    main(
        [
            "generate",
            "--model_name_or_path",
            "lora.safetensors",
            "--prompts",
            "a cat",
            "--output_dir",
            "again",
            *IMAGES,
        ]
    )
    first, again = (Image.open(tmp_path / name / "0000-0.png") for name in ("images", "again"))
    assert max(high - low for low, high in first.getextrema()) > 0
    assert first.tobytes() == again.tobytes()


def write_scorer(folder: Path) -> None:
    (folder / "scorer.py").write_text("def score(images, prompts):\n    return [0.0 for _ in images]\n")
    (folder / "prompts.txt").write_text("a cat\na dog\n")


def test_evaluate_with_another_place_of_the_base(place, moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scorer(tmp_path)
    common = [*SCORING, "--output_dir", "report", *IMAGES]
    models = ["--model_name_or_path", str(moved), "--baseline_name_or_path", str(place / "base")]
    main(["evaluate", *models, "--base_model", str(place / "base"), *common])
    assert (tmp_path / "report" / "report.md").is_file()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("generate", ["--prompts", "a cat", "--output_dir", "out"]),
        ("export", ["--layout", "merged", "--output", "out"]),
        ("export", ["--layout", "kohya", "--output", "out.safetensors"]),
        ("evaluate", ["--baseline_name_or_path", "base", "--output_dir", "out", *SCORING]),
    ],
)
def test_commands_name_a_missing_base(place, moved, tmp_path, monkeypatch, capsys, command, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(place / "base")
    write_scorer(tmp_path)
    with pytest.raises((SystemExit, ValueError)) as error:
        main([command, "--model_name_or_path", str(moved), *options])
    said = f"{error.value} {capsys.readouterr().err}"
    assert "Found no base model" in said
    assert "--base_model" in said


def test_a_base_of_a_whole_model_is_refused(place):
    with pytest.raises(ValueError, match=r"Found `base_model` .* expected it for an adapter"):
        load_trained(str(place / "base"), str(place / "base"))
    with pytest.raises(ValueError, match=r"Found `base_model` .* expected it for an adapter"):
        export_merged(place / "base", place / "merged", base_model=str(place / "base"))


@pytest.mark.parametrize("base", ["", None, "a pipeline in memory", "../elsewhere/base"])
def test_no_base(place, moved, base):
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (moved / "adapter_config.json").write_text(json.dumps(config))
    message = "Found no base model" if base else r"names no base model: pass it as `base_model`"
    with pytest.raises(ValueError, match=message):
        load_trained(str(moved))
    with pytest.raises(ValueError, match=message):
        export_lora(moved, moved / "lora.safetensors")


def test_a_base_that_is_not_on_the_hub(place, moved):
    with pytest.raises(OSError, match=r"The base model 'some-org/none' of '.*run' could not be read .*--base_model"):
        load_trained(str(moved), "some-org/none")


def test_a_base_of_another_architecture(place, moved, tmp_path):
    """What does not fit is not left out."""
    other = tiny_stable_diffusion(down_block_types=("DownBlock2D", "DownBlock2D"))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"modules in the LoRA '.*run', of which this UNet2DConditionModel has got \d+"
    ):
        load_trained(str(moved), str(tmp_path / "other"))
    export_lora(place / "run", tmp_path / "lora.safetensors", layout="kohya")
    with pytest.raises(ValueError, match=r"Found 'lora_unet_down_blocks_0.*no part of this UNet: expected the base"):
        load_trained(str(tmp_path / "lora.safetensors"), str(tmp_path / "other"))


def test_files_for_others_name_no_path(place):
    """Of the two that diffusers reads, this one is made to be shared."""
    assert str(place).encode() not in (place / "run" / "pytorch_lora_weights.safetensors").read_bytes()
    assert (place / "run" / "adapter_config.json").read_text().count(str(place)) == 1


@pytest.mark.parametrize("load", [load_trained, load_merged])
def test_a_base_of_an_unknown_class_is_refused_before_it_is_loaded(place, tmp_path, monkeypatch, load):
    shutil.copytree(place / "base", tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"KandinskyPipeline.*expected one of"):
        load(str(place / "run"), base_model=str(tmp_path / "base"))


@pytest.fixture
def nameless(place, tmp_path):
    """The same, of an adapter that names no base."""
    shutil.copytree(place / "run", tmp_path / "nameless")
    config = json.loads((tmp_path / "nameless" / "adapter_config.json").read_text())
    (tmp_path / "nameless" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    return tmp_path / "nameless"


def test_an_adapter_that_names_no_base(place, nameless, tmp_path, capsys):
    command = ["export", "--model_name_or_path", str(nameless), "--layout", "comfyui", "--output"]
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "lora.safetensors")])
    assert "names no base model: pass it as `base_model` (`--base_model`)" in capsys.readouterr().err
    main([*command, str(tmp_path / "lora.safetensors"), "--base_model", str(place / "base")])
    assert (tmp_path / "lora.safetensors").is_file()


@pytest.mark.parametrize("for_diffusers", [True, False])
def test_a_base_that_is_another_model(place, tmp_path, capsys, for_diffusers):
    """Of other sizes, or of another family whose modules have the same names."""
    tiny_stable_diffusion_xl().save_pretrained(tmp_path / "wider")
    tiny_flux().save_pretrained(tmp_path / "flux")
    lora, run = tmp_path / "lora.safetensors", tmp_path / "run"
    pipeline = DiffusionPipeline.from_pretrained(place / "base")
    policy = get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    policy.peft_config["default"].base_model_name_or_path = str(place / "base")
    run.mkdir()
    save_policy(policy, StableDiffusion(pipeline), run)
    if not for_diffusers:
        (run / "pytorch_lora_weights.safetensors").unlink()  # PEFT reads its own file, as of DoRA
    export_lora(run, lora, layout="diffusers")
    export = ["export", "--model_name_or_path", str(run), "--output", str(tmp_path / "merged"), "--layout", "merged"]
    generate = ["generate", "--prompts", "a cat", "--output_dir", str(tmp_path / "images"), *IMAGES]
    for base in ("wider", "flux"):
        for command in (
            export,
            [*generate, "--model_name_or_path", str(run)],
            [*generate, "--model_name_or_path", str(lora)],
        ):
            with pytest.raises(SystemExit) as error:
                main([*command, "--base_model", str(tmp_path / base)])
            assert error.value.code == 2
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert last.endswith(
                "expected the model that it was trained on, pass it as `base_model` (`--base_model`)."
            )
    assert not (tmp_path / "merged").exists()
    main([*export, "--base_model", str(place / "base")])
    assert (tmp_path / "merged").is_dir()


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya"])
def test_an_exported_lora_is_merged(place, tmp_path, layout):
    export_lora(place / "run", tmp_path / "lora.safetensors", layout=layout)
    found, expected = (load_merged(name).unet.state_dict() for name in (tmp_path / "lora.safetensors", place / "run"))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_evaluate_reads_exported_files(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scorer.py").write_text("def score(images, prompts):\n    return [0.5] * len(images)\n")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    shutil.copytree(place / "base", "base")
    export_lora(place / "run", "lora[1].safetensors", layout="comfyui", base_model="base")
    shutil.move("base", "other")
    pair = ["--model_name_or_path", "lora[1].safetensors", "--baseline_name_or_path", "other"]
    main(["evaluate", *pair, "--base_model", "other", *SCORING, "--output_dir", "out", *IMAGES])
    settings = [json.loads(file.read_text()) for file in Path("out/images").glob("*/settings.json")]
    (lora,) = (s["state"] for s in settings if s["model"] == "lora[1].safetensors")
    assert [name for name, *_ in lora[0]] == ["lora[1].safetensors"]
    assert lora[1] == "other"


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize(
    ("other", "found"),
    [
        (lambda: tiny_stable_diffusion(block_out_channels=(32, 64)), "one of"),
        (tiny_stable_diffusion_3, "none|layout 'kohya' is for UNets"),
    ],
    ids=["another width", "another family"],
)
def test_a_lora_is_not_exported_for_another_base(place, tmp_path, layout, other, found):
    other().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=found):
        export_lora(place / "run", tmp_path / "lora.safetensors", layout=layout, base_model=str(tmp_path / "other"))
    assert not (tmp_path / "lora.safetensors").exists()
