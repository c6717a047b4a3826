"""Tokens and passwords are in no file, tracker's record, command line of a child or stream of output."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml

from tests.conftest import unpaired
from trl_diffusion import DiffusionKTOConfig
from trl_diffusion.families import load_pipeline
from trl_diffusion.hub import public_name
from trl_diffusion.redaction import HIDDEN, MARK, hide, is_secret, redact_argv, redacted, reveal


def secret(place: str) -> str:
    return f"Secret0of0{place}0hidden"


# Every place that takes one. The token file is what `hf auth login` writes.
OPTION, JSON_OPTION, PROXY = secret("option"), secret("json"), secret("proxy")
YAML_TOKEN, YAML_HEADER, YAML_AUTH, YAML_NESTED = map(secret, ("yaml", "header", "auth", "nested"))
ENVIRONMENT, TOKEN_FILE, YAML_ENVIRONMENT = map(secret, ("environment", "file", "yamlenv"))
SECRETS = [value for name, value in globals().items() if isinstance(value, str) and value.startswith("Secret0of0")]
VISIBLE = "visible-run-name"  # what the search does find, in each record

CRASH = """
import sys
from trl_diffusion import DiffusionKTOTrainer
from trl_diffusion.cli import main

def training_step(self, *args, **kwargs):
    raise RuntimeError(f"{vars(self.args)} {sys.argv} {self.args} {self.args!r}")

DiffusionKTOTrainer.training_step = training_step
main()
"""


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        *((name, True) for name in ("token", "hub_token", "use_auth_token", "X-Api-Key", "--hub_token", "apiKey")),
        *((name, True) for name in ("Authorization", "headers", "storage_options", "AWS_SECRET_ACCESS_KEY")),
        *((name, True) for name in ("password", "db_password", "WANDB_API_KEY", "proxy-authorization", "cookies")),
        *((name, False) for name in ("beta", "include_num_input_tokens_seen", "tokenizer", "pad_token_id", "keys")),
        *((name, False) for name in ("HF_TOKEN_PATH", "SSH_AUTH_SOCK", "num_key_value_heads", "monkey", 3, None)),
    ],
)
def test_names_of_secrets(key, expected):
    assert is_secret(key) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"token": "s3cretvalue", "dtype": "float32"}, {"token": MARK, "dtype": "float32"}),
        ({"a": [{"headers": {"X": "s3cretvalue", "n": None}}]}, {"a": [{"headers": {"X": MARK, "n": None}}]}),
        ({"use_auth_token": True, "token": None}, {"use_auth_token": True, "token": None}),
        ({"password": 123456}, {"password": MARK}),
        ('{"token": "s3cretvalue", "a": 1}', f'{{"token": "{MARK}", "a": 1}}'),
        ('{"a": 1,   "b": 2}', '{"a": 1,   "b": 2}'),
        ({"proxies": {"http": "http://me:pass@host:1"}}, {"proxies": {"http": f"http://{MARK}@host:1"}}),
        ("at https://me:p%40ss@host/x?a=1&sig=abc&b=2", f"at https://{MARK}@host/x?a=1&sig={MARK}&b=2"),
        ("Authorization: Bearer abcdefgh.x", f"Authorization: Bearer {MARK}"),
        ("token hf_abcdefghijklmnopqrstuv", f"token {MARK}"),
        ("hf_argparser.py, hf_hub_download", "hf_argparser.py, hf_hub_download"),
        ("s3cretvalue again", f"{MARK} again"),  # it was seen above
        (("https://host/x", 1.5), ("https://host/x", 1.5)),
    ],
)
def test_redacted(value, expected):
    redacted({"token": "s3cretvalue"})
    assert redacted(value) == expected


def test_secrets_of_the_machine_are_redacted(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_API_KEY", "valueofakey")
    assert redacted("x valueofakey y") == f"x {MARK} y"
    assert redacted(os.getcwd()) == os.getcwd()  # PWD is no password


def test_options_are_handed_over_by_the_environment(monkeypatch):
    monkeypatch.setenv(HIDDEN, "[]")
    words = ["--beta", "5", "--hub_token", OPTION, f"--push_to_hub_token={OPTION}", "--bf16"]
    words += [
        "--model_init_kwargs",
        json.dumps({"token": JSON_OPTION}),
        "--dataset_name",
        f"https://me:{PROXY}@host/x",
    ]
    kept = hide(words)
    assert kept == ["--beta", "5", "--bf16"]
    assert sorted([*kept, *reveal()]) == sorted(words)
    assert HIDDEN not in os.environ  # and so neither in what is started from here
    assert reveal() == []
    assert hide(["tests/of_secrets.py", "other.py"]) == ["tests/of_secrets.py", "other.py"]
    monkeypatch.setattr(sys, "argv", ["trl-diffusion", "kto", *words])
    redact_argv()
    assert not [word for word in sys.argv for value in SECRETS if value in word]
    assert sys.argv[:4] == ["trl-diffusion", "kto", "--beta", "5"]


def test_a_configuration_is_printed_without_secrets(tmp_path):
    kwargs = {"headers": {"Authorization": YAML_HEADER}, "token": YAML_TOKEN, "variant": "fp16"}
    config = DiffusionKTOConfig(str(tmp_path), use_cpu=True, hub_token=OPTION, model_init_kwargs=kwargs)
    for text in (str(config), repr(config), config.to_json_string(), json.dumps(config.to_sanitized_dict())):
        assert "fp16" in text
        assert not [value for value in SECRETS if value in text]
    assert config.hub_token == OPTION
    assert config.model_init_kwargs == kwargs


def test_what_libraries_log_is_redacted(sd_folder, monkeypatch):
    handler = logging.getLogger("diffusers").handlers[0]
    monkeypatch.setattr(handler, "stream", io.StringIO())
    load_pipeline(sd_folder, headers={"Authorization": YAML_HEADER}, use_auth_token=YAML_AUTH)
    text = handler.stream.getvalue()
    assert "are not expected by" in text  # diffusers names what it does not know
    assert not [value for value in SECRETS if value in text]


def test_names_that_are_published_have_no_password():
    assert public_name(f"https://me:{PROXY}@host/data") == f"https://{MARK}@host/data"


@pytest.mark.parametrize("options", [["--beta", "-1"], ["--betta", "1"], ["--num_processes", "x"]])
def test_a_refusal_does_not_quote_secrets(refused, sd_folder, tmp_path, monkeypatch, options):
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT)
    words = ["--model_name_or_path", sd_folder, "--dataset_name", tmp_path, "--output_dir", tmp_path / "out"]
    words += ["--hub_token", OPTION, "--model_init_kwargs", json.dumps({"token": JSON_OPTION}), *options]
    for method in ("kto", "dpo"):
        message = refused(method, *words, "--use_cpu")
        assert not [value for value in SECRETS if value in message]


# ---- A training, and all that it leaves behind ----------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, sd_folder):
    """The folder of a training with a secret in every place that takes one."""
    (tmp_path / "data").mkdir()
    unpaired(8).to_parquet(tmp_path / "data" / "train.parquet")
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "token").write_text(TOKEN_FILE)
    kwargs = {
        "token": YAML_TOKEN,
        "headers": {"Authorization": f"Bearer {YAML_HEADER}"},
        "use_auth_token": YAML_AUTH,
        "proxies": {"https": f"http://me:{PROXY}@host:1"},
        "storage_options": {"deep": {"er": YAML_NESTED}},
    }
    options = {
        "model_name_or_path": sd_folder,
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": ["tensorboard", "trackio", "wandb"],
        "run_name": VISIBLE,
        "model_init_kwargs": kwargs,
        "env": {"SOME_PASSWORD": YAML_ENVIRONMENT},
    }
    (tmp_path / "given" / "options.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def start(place: Path, *command: str) -> subprocess.Popen:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "CI"},
        "HOME": str(place),
        "HF_HOME": str(place / "hf"),
        "HF_DATASETS_CACHE": str(place / "hf" / "datasets"),
        "HF_TOKEN": ENVIRONMENT,
        "HF_TOKEN_PATH": str(place / "given" / "token"),
        "WANDB_DIR": str(place / "wandb"),
        "TRACKIO_DIR": str(place / "trackio"),
        "WANDB_MODE": "offline",
    }
    (place / "wandb").mkdir()
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = str(root)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command_lines_below(pid: int) -> list[str]:
    """The command lines of all processes that a process has started."""
    parents, lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            pass

    def below(child: int) -> bool:
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return [line for child, line in lines.items() if child != pid and below(child)]


def texts(folder: Path) -> dict[str, str]:
    """All files of a folder as text, with names, but what was given."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and "given" not in path.parts:
            content = path.read_bytes().decode("latin-1")
            if path.suffix == ".parquet":
                content += str(pyarrow.parquet.read_table(path).to_pylist())
            found[str(path.relative_to(folder))] = f"{path} {content}"
    return found


def run_to_the_end(process: subprocess.Popen) -> tuple[str, str, set[str]]:
    """Both streams, and the command lines of children while it ran."""
    seen: set[str] = set()
    done = threading.Event()

    def watch():
        while not done.wait(0.05):
            seen.update(command_lines_below(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        out, err = process.communicate(timeout=500)
    finally:
        done.set()
        watcher.join()
        process.kill()
    return out, err, seen


@pytest.mark.slow
@pytest.mark.parametrize("case", ["several processes", "crash"])
def test_a_training_leaves_no_secret_behind(place, case):
    words = ["kto", "--config", str(place / "given" / "options.yaml"), "--hub_token", OPTION]
    if case == "crash":
        process = start(place, "-c", CRASH, *words)
    else:
        words += ["--model_init_kwargs", json.dumps({"token": JSON_OPTION, "headers": {"x": YAML_HEADER}})]
        process = start(place, "-c", "from trl_diffusion.cli import main; main()", *words, "--num_processes", "2")
    out, err, children = run_to_the_end(process)
    files = texts(place)
    found = {**files, "stdout": out, "stderr": err} | {f"child {i}": line for i, line in enumerate(children)}
    assert [(name, value) for name, text in found.items() for value in SECRETS if value in text] == []
    if case == "crash":
        assert process.returncode == 1, err[-3000:]
        assert "RuntimeError" in err
        assert MARK in err
    else:
        assert process.returncode == 0, err[-3000:]
        assert any("rank.py" in line for line in children)
        assert MARK in files["out/training_args.json"]
    # Each tracker has written, and the search looks into what it wrote; trackio writes late, and not after a crash.
    for tracker in ("wandb/", "runs/", *(["trackio/"] if case != "crash" else [])):
        assert any(tracker in name and VISIBLE in text for name, text in files.items()), (tracker, sorted(files))
