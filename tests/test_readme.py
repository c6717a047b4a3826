"""Python blocks of README and docs are run for fewer steps, the README's commands too; those of docs are parsed."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from trl_diffusion import families
from trl_diffusion.cli import bench, beta, launch, main, training


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "examples/emoji/data/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
# `make test` runs this file, tests/test_docs.py does what `make docs` does; the others install what is there already.
NOT_RUN = {"make test", "make demo", "make docs", "pip install -e ."}
# What these print is compared with the block behind them.
PRINTED = ("trl-diffusion beta convert", "trl-diffusion data inspect preferences")


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def with_blocks(*languages: str):
    pages = [page for page in PAGES if blocks(page, *languages)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the repository's root, so that outputs stay out of it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "kto.yaml").symlink_to(ROOT / "examples/emoji/kto.yaml")  # the reader's own, in the docs
    return folder


@pytest.mark.slow
@with_blocks("python")
def test_python_blocks(page, workplace, monkeypatch):
    """The blocks of a page, one after the other as a reader would run them, but without a new interpreter."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES])  # a page appends to it
    code = "\n".join(blocks(page, "python"))
    assert code.count("max_steps=100") == code.count(".train()")
    exec(compile(code.replace("max_steps=100", "max_steps=2"), page, "exec"), {"__name__": "__main__"})
    if page.stem == "README":
        assert (workplace / "outputs/emoji-kto-lora/pytorch_lora_weights.safetensors").is_file()


def run(command: list[str], folder: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_commands(workplace, monkeypatch):
    """In processes of their own, but for those that differ from the first only in the method, or do not train."""
    monkeypatch.chdir(workplace)
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines() if line.strip()]
    commands = [line for line in lines if line not in NOT_RUN]
    assert len(commands) == 7
    for line in commands:
        words = shlex.split(line)
        if "--config" in words:
            words += ["--max_steps", "2", "--per_device_train_batch_size", "2"]
        if "generate" in line:
            words += ["--num_inference_steps", "2", "--num_images_per_prompt", "1"]
        if words[:2] in (["trl-diffusion", "kto"], ["accelerate", "launch"]):
            run(words, workplace)
        else:
            main(words[1:])
    for method in ("kto", "rpo", "dpo", "sft"):
        assert (workplace / f"outputs/emoji-{method}/model_index.json").is_file()
    assert (workplace / "outputs/pictures/grid.png").is_file()


# ---- Commands of the docs -------------------------------------------------------------------------------------------


class Understood(Exception):
    """Raised where a command has read its options and would begin its work."""


def command_lines(page: Path) -> list[list[str]]:
    """The commands of a page, word by word; those inside of a job script's command too."""
    text = re.sub(r"\s*\\\n\s*", " ", "".join(blocks(page, "bash", "shell")))
    text = re.sub(r"\$\(\(.*?\)\)|\$\(.*?\)|\$\w+", "2", text)  # what a shell would put in
    return [shlex.split(re.sub(r"^srun .* bash -c '(.*)'$", r"\1", line)) for line in text.splitlines()]


def understand(program: str, command: str, *argv: str) -> None:
    """Raises where a command does not exist, or one of its options."""
    if program == "make":
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        assert (ROOT / command).is_file()
    elif (program, command) == ("accelerate", "launch"):
        args = launch_command_parser().parse_args(argv)
        script = importlib.import_module(f"trl_diffusion.cli.{Path(args.training_script).stem}")
        config_class = getattr(script, f"Diffusion{Path(args.training_script).stem.upper()}Config")
        training.make_parser(config_class).parse_args_and_config(args.training_script_args)
    elif command in ("data", "evaluate", "export", "generate"):
        importlib.import_module(f"trl_diffusion.cli.{command}").make_parser().parse_args(argv)
    elif command == "env" or (command, *argv)[:2] == ("beta", "convert"):
        main([command, *argv])  # done at once
    else:
        assert program == "trl-diffusion"
        with pytest.raises(Understood):
            main([command, *argv])


@with_blocks("bash", "shell")
def test_commands_are_understood(page, workplace, monkeypatch):
    def begin(*args, **kwargs):
        raise Understood

    for module, name in (
        (launch.Launch, "check"),
        (bench, "make_trainer"),
        (bench, "estimate"),
        (beta, "random_rows"),
    ):
        monkeypatch.setattr(module, name, begin)
    monkeypatch.chdir(workplace)
    for words in command_lines(page):
        if words and shlex.join(words) not in NOT_RUN and words[0] != "pip":
            understand(*words)


def test_what_commands_print(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    found = 0
    for page in PAGES:
        for command, output in re.findall(
            r"^```bash\n(trl-diffusion [^\n]*)\n```\n\n```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        ):
            if command.startswith(PRINTED):
                main(shlex.split(command)[1:])
                assert capsys.readouterr().out == output
                found += 1
    assert found == len(PRINTED)


# ---- Links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_and_pages_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_ci_runs_the_readmes_test_command():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()
