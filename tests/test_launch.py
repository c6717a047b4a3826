"""What was asked for is what runs, or it is refused before a model is loaded: processes, engines, options."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainerCallback

from tests.conftest import unpaired
from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer, engines
from trl_diffusion.cli import kto, launch, main, training
from trl_diffusion.cli.launch import Launch
from trl_diffusion.cli.training import make_parser
from trl_diffusion.trainer import base_trainer


ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
EMOJI = ROOT / "examples" / "emoji"
CONFIGS = sorted(file.stem for file in (ROOT / "trl_diffusion" / "accelerate_configs").glob("*.yaml"))
REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
ZERO_2 = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}


# ---- The trainer's own check ----------------------------------------------------------------------------------------


def begin_training(monkeypatch, folder, before=(), after=(), **options) -> None:
    """Builds a trainer; some of a launcher's environment is there before the configuration, some after it."""

    def resolve_model(*args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(base_trainer, "resolve_model", resolve_model)
    for name, value in before:
        monkeypatch.setenv(name, value)
    args = DiffusionKTOConfig(str(folder), report_to="none", **{"use_cpu": True} | options)
    for name, value in after:
        monkeypatch.setenv(name, value)
    DiffusionKTOTrainer(model="m", args=args, train_dataset=unpaired())


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_that_would_train_alone(monkeypatch, tmp_path, name):
    with pytest.raises(ValueError, match=rf"Found {name}=2 and a training of 1 process\(es\)"):
        begin_training(monkeypatch, tmp_path, after=[(name, "2")])


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        # What `accelerate launch --cpu --num_processes 2` leaves in the environment of its one process.
        (
            {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
            {},
            "Found `accelerate launch` for several processes, of which it starts one",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            {},
            r"Found FSDP with 1 process\(es\) on cpu, where accelerate shards nothing",
        ),
        ({}, {"deepspeed": ZERO_2}, "Found a DeepSpeed configuration in a process that no launcher has started"),
        (
            {"LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "True"},
            {"deepspeed": ZERO_2},
            "Found a DeepSpeed configuration under `accelerate launch --cpu`",
        ),
        (
            {"LOCAL_RANK": "0"},
            {"deepspeed": {**ZERO_2, "gradient_clipping": 0.5}, "max_grad_norm": 0.01},
            "Found gradient_clipping=0.5 and max_grad_norm=0.01 in the DeepSpeed configuration",
        ),
        (
            {"LOCAL_RANK": "0"},
            {"deepspeed": {**ZERO_2, "gradient_clipping": 1.0}, "max_grad_norm": 0.0},
            "Found gradient_clipping=1.0 and max_grad_norm=0.0",
        ),
        (
            {"LOCAL_RANK": "0"},
            {"deepspeed": {**ZERO_2, "bf16": {"enabled": True}}, "bf16": False},
            r"Found bf16.enabled=True and bf16\|bf16_full_eval=False",
        ),
    ],
)
def test_what_would_not_run_is_refused(monkeypatch, tmp_path, environment, options, message):
    if "deepspeed" in options:
        pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match=message):
        begin_training(monkeypatch, tmp_path, after=environment.items(), **copy.deepcopy(options))


def test_clipping_in_accelerates_deepspeed_configuration(monkeypatch, tmp_path):
    """`deepspeed_config: {gradient_clipping: 0.5}` of accelerate, where the training clips at 1."""
    pytest.importorskip("deepspeed")
    before = [("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_GRADIENT_CLIPPING", "0.5")]
    with pytest.raises(ValueError, match=r"Found gradient_clipping=0\.5 and max_grad_norm=1\.0"):
        begin_training(monkeypatch, tmp_path, before, [("LOCAL_RANK", "0")])


@pytest.mark.parametrize(("written", "expected"), [({}, 0.25), ({"gradient_clipping": "auto"}, 0.25)])
def test_deepspeed_clips_as_the_training_does(monkeypatch, tmp_path, written, expected):
    """A configuration without `gradient_clipping` too."""
    pytest.importorskip("deepspeed")
    args = DiffusionKTOConfig(
        str(tmp_path), use_cpu=True, report_to="none", deepspeed={**ZERO_2, **written}, max_grad_norm=0.25
    )
    engines._set_up_deepspeed(args.deepspeed_plugin, torch.nn.Module(), args)
    assert args.deepspeed_plugin.hf_ds_config.config["gradient_clipping"] == expected


def test_fsdp_is_refused_once(monkeypatch, tmp_path):
    """transformers leaves its wish in the environment."""
    for options in ({"fsdp": True, "fsdp_config": {"version": 2}}, {}):
        with pytest.raises((ValueError, AssertionError), match="Found FSDP" if options else "a model was loaded"):
            begin_training(monkeypatch, tmp_path, **options)


# ---- Precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cpu", [True, False])
def test_fp16_on_a_cpu(tmp_path, use_cpu):
    if not use_cpu and torch.accelerator.is_available():
        pytest.skip("is for machines without an accelerator")
    with pytest.raises(ValueError, match="Found fp16 on a CPU, where accelerate computes in float32"):
        DiffusionKTOConfig(str(tmp_path), fp16=True, use_cpu=use_cpu)


@pytest.mark.parametrize(
    ("launched", "options", "expected"),
    [
        ("no", {}, False),
        ("no", {"bf16": True}, True),
        ("bf16", {}, True),
        ("bf16", {"bf16": True}, True),
        ("bf16", {"bf16": False}, "Found mixed_precision='bf16' .* bf16=False, fp16=False"),
        ("fp16", {"bf16": True}, "Found mixed_precision='fp16' .* bf16=True"),
        ("fp16", {}, "Found fp16 on a CPU"),
        ("fp8", {}, "Found mixed_precision='fp8'"),
    ],
)
def test_precision_of_accelerate_launch(monkeypatch, tmp_path, launched, options, expected):
    """`accelerate launch --mixed_precision`, or its configuration, and the training's own options."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            DiffusionKTOConfig(str(tmp_path), use_cpu=True, **options)
    else:
        args = DiffusionKTOConfig(str(tmp_path), use_cpu=True, **options)
        assert (args.bf16, args.mixed_precision) == (expected, "bf16" if expected else "no")


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)


def config(**changes) -> SimpleNamespace:
    """What the launcher reads of a configuration."""
    return SimpleNamespace(**{"use_cpu": False, "bf16": False, "fp16": False, "deepspeed": None, "fsdp": ""} | changes)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_precision_follows_the_training(eight_devices, name, precision):
    plan = Launch(["--accelerate_config", name])
    plan.check(config(**{} if precision == "no" else {precision: True}))
    assert plan.args.mixed_precision == precision
    wrong = Launch(["--accelerate_config", name, "--mixed_precision", "fp8"])
    with pytest.raises(ValueError, match="Found `mixed_precision` fp8 and a training with"):
        wrong.check(config(**{} if precision == "no" else {precision: True}))


# ---- What the launcher's options ask for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "machine", "expected"),
    [
        ([], "cpu", (1, None, False, True)),
        (["--num_processes", "1"], "cpu", (1, None, False, True)),
        (["--cpu"], "cpu", (1, None, True, True)),
        (["--num_processes", "2"], "cpu", (2, None, True, False)),
        (["--cpu", "--num_processes=2"], "cpu", (2, None, True, False)),
        (["--accelerate_config", "single_gpu"], "cpu", (1, None, False, True)),
        (["--dynamo_backend", "inductor"], "cpu", (1, None, False, False)),
        (["--accelerate_config", "single_gpu"], "gpus", (1, None, False, False)),
        (["--num_processes", "8"], "gpus", (8, None, False, False)),
        (["--accelerate_config", "multi_gpu"], "gpus", (8, "multi_gpu", False, False)),
        (["--accelerate_config", "zero3", "--num_processes", "2"], "gpus", (2, "use_deepspeed", False, False)),
        (["--accelerate_config", "fsdp2"], "gpus", (8, "use_fsdp", False, False)),
        (["--cpu", "--num_processes", "9"], "gpus", (9, None, True, False)),
    ],
)
def test_what_is_started(request, options, machine, expected):
    if machine == "gpus":
        request.getfixturevalue("eight_devices")
    elif torch.accelerator.is_available():
        pytest.skip("is for machines without an accelerator")
    plan, args = Launch(options), config()
    args.use_cpu = plan.on_cpu
    plan.check(args)
    assert (plan.processes, plan.engine, plan.on_cpu, plan.in_place(args)) == expected


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["--num_processes", "9"], {}, r"Found num_processes=9 on 1 machine\(s\) with 8 device\(s\)"),
        (["--accelerate_config", "fsdp2"], {"use_cpu": True}, "Found FSDP on a CPU"),
        (["--accelerate_config", "single_gpu", "--num_processes", "2"], {}, "for one process .distributed_type 'NO'"),
        (["--num_machines", "2", "--num_processes", "3"], {}, "Found num_processes=3 on num_machines=2"),
        (["--num_machines", "2", "--num_processes", "2"], {}, "without `--machine_rank`"),
        (["--tpu"], {}, "Found `tpu`, which these trainers do not support"),
        (["--num_processes", "0"], {}, "Found num_processes=0, expected at least 1"),
        (["--num_processes", "2", "--num_machines=-1"], {}, "Found num_machines=-1, expected at least 1"),
        (["--num_processes", "two"], {}, "invalid int value: 'two'"),
        (["--num_processes", "2", "3"], {}, "Found the word '3', which belongs to no option"),
        (["--cpu", "true"], {}, "Found the word 'true', which belongs to no option"),
        (["--accelerate_config", str(ROOT / "README.md")], {}, ""),
    ],
)
def test_launches_that_are_refused(eight_devices, options, changes, message):
    with pytest.raises((ValueError, yaml.YAMLError), match=message):
        Launch(options).check(config(**changes))


def test_a_cpu_is_one_process(monkeypatch, eight_devices):
    """Where accelerate would count GPUs, which are not used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for use_cpu, expected in ((False, (8, "multi_gpu")), (True, (1, None))):
        plan = Launch([])
        plan.check(config(use_cpu=use_cpu))
        assert (plan.processes, plan.engine, plan.in_place(config(use_cpu=use_cpu))) == (*expected, use_cpu)


def test_fp8_of_a_configuration(tmp_path, eight_devices):
    file = ROOT / "trl_diffusion" / "accelerate_configs" / "multi_gpu.yaml"
    (tmp_path / "mine.yaml").write_text(file.read_text().replace("mixed_precision: bf16", "mixed_precision: fp8"))
    with pytest.raises(ValueError, match="Found `mixed_precision` fp8 and a training with bf16=True"):
        Launch(["--accelerate_config", str(tmp_path / "mine.yaml")]).check(config(bf16=True))


@pytest.mark.parametrize("name", ["multi_gpu", "zero2", "fsdp2"])
def test_engines_need_devices(name):
    if torch.accelerator.is_available():
        pytest.skip("is for machines without an accelerator")
    with pytest.raises(ValueError, match=r"on a machine without an accelerator; set `--use_cpu`"):
        Launch(["--accelerate_config", name, "--num_processes", "2"]).check(config())


@pytest.mark.parametrize(
    "words",
    [
        ["--accelerate_config", "zero3", "--num_processes", "2"],
        ["--accelerate_config=zero3", "--num_processes=2"],
        ["--accelerate_config", "zero2", "--num-processes=3", "--accelerate-config=zero3", "--num-processes", "2"],
    ],
)
def test_the_last_one_counts(tmp_path, eight_devices, words):
    """Of the YAML file and the command line, in every spelling."""
    file = tmp_path / "recipe.yaml"
    file.write_text("accelerate_config: multi_gpu\nnum_processes: 8\nuse_fsdp: false\ndynamo_backend: null\n")
    own, asked = make_parser(DiffusionKTOConfig).split([*REQUIRED, "--config", str(file), *words])
    assert own == [*REQUIRED, "--config", str(file)]
    plan = Launch(asked)
    assert Path(plan.args.config_file).stem == "zero3"
    assert (plan.processes, plan.engine) == (2, "use_deepspeed")


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--resume_from_checkpoint"], True),
        (["--resume_from_checkpoint", "--use_cpu"], True),
        (["--resume_from_checkpoint", "true"], True),
        (["--resume_from_checkpoint=True"], True),
        (["--resume-from-checkpoint", "latest"], True),
        (["--resume_from_checkpoint", "false"], None),
        (["--resume_from_checkpoint", "o/checkpoint-3"], "o/checkpoint-3"),
        ("true", True),
        ("latest", True),
        ("false", None),
        ("null", None),
        ("o/checkpoint-3", "o/checkpoint-3"),
    ],
)
def test_resume_from_checkpoint(tmp_path, words, expected):
    if isinstance(words, str):
        (tmp_path / "options.yaml").write_text(f"resume_from_checkpoint: {words}\n")
        words = ["--config", str(tmp_path / "options.yaml")]
    _, args, _ = make_parser(DiffusionKTOConfig).parse_args_and_config([*REQUIRED, *words])
    assert args.resume_from_checkpoint == expected


YAML = {
    "lerning_rate: 1": "unknown option 'lerning_rate' in the configuration file; did you mean 'learning_rate'?",
    "num_proceses: 2": "unknown option 'num_proceses' in the configuration file; did you mean 'num_processes'?",
    "accelerate_confg: zero2": "did you mean 'accelerate_config'?",
    "zzzz: 2": "in the configuration file; see `trl-diffusion kto --help`",
    "- a": "expected options, one `name: value` per line",
    "": "Found nothing in",
    "a: [": "Found no valid YAML in",
    "learning_rate: fast": "Found `learning_rate: fast` in the configuration file; invalid float value: 'fast'",
    "learning_rate: [1]": "Found `learning_rate: [1]` in the configuration file; expected one value",
    "learning_rate: {a: 1}": "expected one value",
    "max_steps: 1.5": "invalid int value: '1.5'",
    "max_steps: true": "invalid int value: 'True'",
    "weighting: naive": "invalid choice: 'naive' (choose from 'native', 'epsilon', 'min_snr', 'elbo'); did you mean",
    "dtype: float64": "invalid choice: 'float64'",
    "save_strategy: no": "YAML reads an unquoted no",
    "use_cpu: maybe": "Truthy value expected",
    "cpu: maybe": "Found `cpu: maybe`, expected true or false",
    "env: 3": "Found no names and values in `env` of the configuration file",
    "beta: -1": "`beta` must be positive and finite, found -1.0",
}
WORDS = {
    "--lerning_rate 1": "Found no option '--lerning_rate'; did you mean '--learning_rate'?",
    "--num_procesess=2": "Found no option '--num_procesess'; did you mean '--num_processes'?",
    "--zzzz": "Found no option '--zzzz'; see `trl-diffusion kto --help`",
    "--learning_rate": "expected one argument",
    "--learning_rate fast": "invalid float value: 'fast'",
    "--weighting naive": "invalid choice: 'naive'",
    "word": "Found the word 'word', which belongs to no option",
    "--config": "Found `--config` without a value",
    "--config a --config b": "Found `--config` 2 times, expected it once",
    "--config nowhere.yaml": "Found no file 'nowhere.yaml'",
    "--accelerate_config zero9": "did you mean 'zero",
    "--fp16 true --use_cpu": "Found fp16 on a CPU",
    "--beta -1": "`beta` must be positive and finite, found -1.0",
}


@pytest.mark.parametrize("case", [*YAML, *WORDS], ids=repr)
def test_mistakes_in_one_line(monkeypatch, tmp_path, capsys, case):
    """Before anything is started or loaded."""

    def begin(*args):
        raise AssertionError("a training was begun")

    monkeypatch.setattr(training, "train", begin)
    monkeypatch.setattr(Launch, "start", begin)
    (tmp_path / "options.yaml").write_text(case)
    words = ["--config", str(tmp_path / "options.yaml")] if case in YAML else case.split()
    with pytest.raises(SystemExit) as exit_:
        main(["kto", *REQUIRED, *words])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trl-diffusion kto: error: ")
    assert {**YAML, **WORDS}[case] in line


def test_options_of_a_file(tmp_path):
    """Values that YAML has and a command line has not, and those that it reads otherwise."""
    file = tmp_path / "options.yaml"
    file.write_text(
        "learning_rate: 1e-5\nresolution: [512, 832x1216]\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "desirable_ratio: null\nvalidation_prompts: [a cat, 5]\nreport_to: none\nuse_cpu: true\nmax_grad_norm: 2\n"
    )
    _, args, _ = make_parser(DiffusionKTOConfig).parse_args_and_config(
        [*REQUIRED, f"--config={file}", "--max_grad_norm", "3"]
    )
    assert (args.learning_rate, args.max_grad_norm, args.desirable_ratio) == (1e-5, 3.0, None)
    assert (args.resolution, args.lr_scheduler_kwargs) == (["512", "832x1216"], {"num_cycles": 2})
    assert (args.validation_prompts, args.report_to, args.use_cpu) == (["a cat", "5"], [], True)


def test_launchers_options_in_a_script_that_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kto.py", *REQUIRED, "--num_processes", "2"])
    with pytest.raises(SystemExit) as exit_:
        kto.main()
    assert exit_.value.code == 2
    assert "kto.py: error: Found `num_processes`, which starts processes" in capsys.readouterr().err


def test_the_command_as_a_rank(monkeypatch, refused):
    """`torchrun --no-python trl-diffusion kto`: it starts nothing itself."""
    begun = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(training, "train", lambda *args: begun.append(args[0]))
    monkeypatch.setattr(training.TrainingParser, "parse_own", lambda self, words: ())
    monkeypatch.setattr(Launch, "start", lambda *args: begun.append("start"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    main(["kto", *REQUIRED])
    assert begun == [DiffusionKTOTrainer]
    assert "Found `num_processes`, which starts processes" in refused("kto", *REQUIRED, "--num_processes", "2")


# ---- Errors before and in the training ------------------------------------------------------------------------------


class Failing:
    """A trainer that fails before its first step, or in it."""

    def __init__(self, error: Exception, begun: bool):
        self.error, self.begun, self.callbacks = error, begun, []
        self.state = SimpleNamespace(global_step=3)

    def add_callback(self, callback: TrainerCallback) -> None:
        self.callbacks.append(callback)

    def train(self, resume_from_checkpoint):
        for callback in self.callbacks if self.begun else ():
            callback.on_step_begin(None, None, None)
        raise self.error


@pytest.mark.parametrize(
    ("error", "begun", "code"),
    [
        (ValueError("no checkpoint"), False, 2),
        (OSError("disk full"), True, None),
        (ValueError("shapes"), True, None),
        (RuntimeError("a bug"), False, None),
        (FloatingPointError("not finite at step 3"), True, 1),
    ],
)
def test_an_error_in_the_training_is_no_mistake_in_the_options(monkeypatch, capsys, error, begun, code):
    monkeypatch.setattr(training, "make_trainer", lambda *args: Failing(error, begun))
    with pytest.raises((SystemExit, RuntimeError)) as found:
        main(["kto", *REQUIRED, "--use_cpu"])
    if code is None:
        assert found.type is RuntimeError  # with its traceback, and exit code 1
        assert error in (found.value, found.value.__cause__)
    else:
        assert found.value.code == code
        assert capsys.readouterr().err.splitlines() == [f"trl-diffusion kto: error: {error}"]


@pytest.mark.parametrize("who", ["torchrun", "trl-diffusion"])
def test_a_rank_reports_to_its_launcher(monkeypatch, tmp_path, capsys, who):
    """It says nothing itself where the launcher is ours."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "0")
    if who == "trl-diffusion":
        monkeypatch.setenv(launch.rank.LAUNCHER, "1")
    with pytest.raises(SystemExit) as exit_, training.training_errors("kto.py"):
        raise ValueError("found this,\nexpected that")
    assert exit_.value.code == 2
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "found this, expected that"
    said = capsys.readouterr().err
    assert said == ("kto.py: error: found this, expected that\n" if who == "torchrun" else "")


# ---- Real launches --------------------------------------------------------------------------------------------------


def options(folder: Path) -> list[str]:
    words = ["--model_name_or_path", EMOJI / "base", "--dataset_name", EMOJI / "data", "--dataset_config", "feedback"]
    words += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--learning_rate", 1e-4, "--beta", 100]
    words += ["--gradient_checkpointing", "false", "--report_to", "none", "--output_dir", folder / "out"]
    return list(map(str, words))


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "CI"}
    return kept | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder), "PYTHONWARNINGS": "ignore"}


def started(folder: Path, *command: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=600
    )


TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [BIN / "accelerate", "launch"]
COMMAND = [BIN / "trl-diffusion", "kto"]
REFUSED = {
    "python, deepspeed": (
        [sys.executable, "examples/kto.py", "--use_cpu", "--deepspeed", json.dumps(ZERO_2)],
        "a DeepSpeed configuration in a process that no launcher has started",
    ),
    "accelerate launch, two": (
        [*ACCELERATE, "--cpu", "--num_processes", "2", "examples/kto.py"],
        "Found `accelerate launch` for several processes, of which it starts one",
    ),
    "torchrun, two": ([*TORCHRUN, "examples/kto.py"], "Found WORLD_SIZE=2 and a training of 1 process"),
    # Found by the ranks: the data are no pairs.
    "trl-diffusion, two, a mistake": (
        [BIN / "trl-diffusion", "dpo", "--num_processes", "2"],
        "The training data set is unpaired: found",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_real_launches_that_are_refused(tmp_path, case):
    if torch.accelerator.is_available():
        pytest.skip("is for machines without an accelerator")
    if "deepspeed" in case:
        pytest.importorskip("deepspeed")
    command, message = REFUSED[case]
    done = started(tmp_path, *command, *options(tmp_path))
    assert message in done.stderr
    assert "Loading pipeline" not in done.stderr
    assert not list(tmp_path.glob("out/**/*.safetensors"))
    if "accelerate" in case or "torchrun" in case:  # which end with a report and an exit code of their own
        assert done.returncode == 1
        assert len(re.findall(r"^kto\.py: error: ", done.stderr, re.MULTILINE)) <= 1
    else:
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.count(message) == 1
        assert done.stderr.splitlines()[-1].endswith(".")


@pytest.mark.slow
def test_two_processes_on_a_cpu(tmp_path):
    """The README's `--num_processes 2`, on whatever machine."""
    done = started(tmp_path, *COMMAND, "--cpu", "--num_processes", "2", *options(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Model saved to") == 1
    assert "| processes | 2, DDP |" in (tmp_path / "out" / "README.md").read_text()


def marked(mark: str) -> set[int]:
    """The processes with a word in their environment that have not ended; each rank has its own session."""
    alive = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():  # empty once it has ended
                alive.add(int(entry.name))
        except OSError:
            continue
    return alive


def wait_for(what, seconds: float):
    """Polls, because nothing tells."""
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG, /proc")
@pytest.mark.parametrize(
    ("name", "when"), [("SIGTERM", "start"), ("SIGINT", "start"), ("SIGHUP", "start"), ("SIGKILL", "training")]
)
def test_signals_end_every_process(tmp_path, name, when):
    """Sent to the command alone; its ranks are importing, or training."""
    mark = uuid.uuid4().hex
    command = [*COMMAND, "--cpu", "--num_processes", "2", *options(tmp_path), "--max_steps", "100000"]
    process = subprocess.Popen(
        [*map(str, command), "--logging_steps", "1"],
        cwd=ROOT,
        env=environment(tmp_path) | {"MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert wait_for(lambda: len(marked(mark)) >= 3, 200)
        if when == "training":
            assert any("'loss'" in line for line in process.stdout)
        number = getattr(signal, name)
        os.kill(process.pid, number)
        assert process.wait(60) == (-number if name == "SIGKILL" else 128 + number)
        assert wait_for(lambda: not marked(mark), 60), marked(mark)
    finally:
        for left in marked(mark):
            os.kill(left, signal.SIGKILL)
        process.communicate()
