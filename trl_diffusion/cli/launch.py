"""How many processes a training command starts, on what, and how they end."""

import argparse
import functools
import logging
import os
import signal
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import DistributedType
from accelerate.commands.launch import (
    _validate_launch_command,
    deepspeed_launcher,
    launch_command_parser,
    multi_gpu_launcher,
)
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ..redaction import hide
from . import rank
from .errors import suggestion


# What the commands decide themselves: which script is started, and how an error is reported.
_NOT_OFFERED = {"help", "module", "no_python", "debug", "training_script", "training_script_args"}
# Options that one process on one device needs no launcher for.
_IN_PLACE = {"config_file", "num_processes", "num_machines", "machine_rank", "mixed_precision", "cpu", "quiet"}


@functools.cache
def launch_options() -> dict[str, argparse.Action]:
    """Options of `accelerate launch` by name, with their dashes, and our `--accelerate_config`."""
    parser = launch_command_parser()
    found = {
        name: action
        for name, action in parser._option_string_actions.items()
        if name.startswith("--") and action.dest not in _NOT_OFFERED
    }
    return found | dict.fromkeys(("--accelerate_config", "--accelerate-config"), found["--config_file"])


def as_words(key: str, value: Any) -> list[str]:
    """An option of [`launch_options`] from a YAML file as words of a command line."""
    action = launch_options()[f"--{key}"]
    if action.nargs == 0:
        if value not in (True, False, None):
            raise ValueError(f"Found `{key}: {value}`, expected true or false")
        return [f"--{key}"] if value else []
    if value is None:
        return []
    return [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def resolve_accelerate_config(options: list[str]) -> list[str]:
    """
    Turns `--accelerate_config NAME` into accelerate's `--config_file`, as TRL does.

    Args:
        options (`list[str]`): Options of `accelerate launch`; `NAME` is a file, or one of `accelerate_configs/`.

    Raises:
        `ValueError`: if there is neither such a file nor such a name, or nothing follows the option.
    """
    folder = files("trl_diffusion") / "accelerate_configs"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    words, rest = [], list(options)
    while rest:
        option, equals, name = rest.pop(0).partition("=")
        if option not in ("--accelerate_config", "--accelerate-config"):
            words.append(option + equals + name)
            continue
        if not equals:  # both spellings of argparse: `--option value` and `--option=value`
            name = rest.pop(0) if rest else ""
        if not Path(name).is_file():
            if name not in known:
                raise ValueError(
                    f"Found `--accelerate_config {name}`, expected a file or one of {known}{suggestion(name, known)}"
                )
            name = str(folder / f"{name}.yaml")
        words += ["--config_file", name]
    return words


class Launch:
    """
    What the launcher's options ask for, as `accelerate launch` understands them.

    Args:
        options (`list[str]`): Options of `accelerate launch`; of an option that is given twice the last one counts.

    Raises:
        `ValueError`: for values that cannot be used.
    """

    def __init__(self, options: list[str]):
        parser = launch_command_parser()
        parser.error = _refuse  # accelerate's would print a hundred lines first
        args = parser.parse_args([*resolve_accelerate_config(options), rank.__file__])
        if args.training_script != rank.__file__:
            raise ValueError(f"Found the word {args.training_script!r}, which belongs to no option")
        # It tells which defaults it has used, which the user of this command does not have to give.
        logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
        given = args.nondefault - {"training_script", "training_script_args"}
        for name in ("num_processes", "num_machines"):
            if name in given and getattr(args, name) < 1:
                raise ValueError(f"Found {name}={getattr(args, name)}, expected at least 1")
        self._is_counted = "num_processes" in given
        self.mixed_precision: str | None = args.mixed_precision
        try:
            args, defaults, _ = _validate_launch_command(args)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"Found {args.config_file}, expected a configuration that `accelerate config` could have written"
            ) from error
        self.args = args
        if defaults is not None:
            self._is_counted = True
            if defaults.mixed_precision == "fp8":
                self.mixed_precision = "fp8"
        self._deepspeed_fields = list(defaults.deepspeed_config) if defaults is not None else []
        self.engine = next((name for name in ("use_deepspeed", "use_fsdp", "multi_gpu") if getattr(args, name)), None)
        for name in ("tpu", "use_megatron_lm", "mpirun_hostfile"):
            if getattr(args, name):
                raise ValueError(f"Found `{name}`, which these trainers do not support: use DDP, DeepSpeed or FSDP2")
        self.processes = max(1, args.num_processes or 1)
        args.num_processes = self.processes
        self.machines = args.num_machines = args.num_machines or 1
        has_accelerator = torch.accelerator.is_available()
        self.on_cpu = bool(
            args.cpu
            or getattr(args, "use_cpu", False)
            or (self.processes > 1 and self.engine is None and not has_accelerator)
        )
        single = defaults is not None and defaults.distributed_type == DistributedType.NO
        if single and self.processes > 1 and self.engine is None:
            raise ValueError(
                f"Found num_processes={self.processes} and {args.config_file or 'the default configuration'} for one "
                "process (distributed_type 'NO'); set `--num_processes 1`, or name another `--accelerate_config`"
            )
        self._check_machines()
        self._needs_launcher = not (
            given <= _IN_PLACE and args.gpu_ids in (None, "all") and args.dynamo_backend == "no" and not args.debug
        )

    def _check_machines(self) -> None:
        args = self.args
        if self.processes % self.machines:
            raise ValueError(
                f"Found num_processes={self.processes} on num_machines={self.machines}; `num_processes` counts those "
                "of all machines, expected as many on each"
            )
        if self.machines > 1:
            missing = [name for name in ("machine_rank", "main_process_ip") if getattr(args, name) is None]
            if missing:
                raise ValueError(f"Found num_machines={self.machines} without `--{missing[0]}`; see docs/scaling.md")
            if self.engine == "use_deepspeed" and args.deepspeed_multinode_launcher != "standard":
                raise ValueError(
                    f"Found deepspeed_multinode_launcher={args.deepspeed_multinode_launcher}, expected 'standard'; "
                    "start the same command on each machine, see docs/scaling.md"
                )

    def check(self, training_args) -> None:
        """
        Raises `ValueError` where the processes could not do what they are started for.

        Args:
            training_args ([`DiffusionConfig`]): The training's configuration.
        """
        if training_args.use_cpu and not self._is_counted:  # accelerate would start one for each GPU
            self.processes = self.args.num_processes = 1
            self.engine = None
        engine = self.engine or next((name for name in ("deepspeed", "fsdp") if getattr(training_args, name)), None)
        if engine is not None and "fsdp" in engine and training_args.use_cpu:
            raise ValueError("Found FSDP on a CPU, where accelerate shards nothing; use `multi_gpu` (DDP)")
        if training_args.use_cpu:
            pass
        elif engine is not None and not torch.accelerator.is_available():
            raise ValueError(
                f"Found {engine} on a machine without an accelerator; set `--use_cpu` to train on its CPU"
            )
        elif self.processes > 1 and self.processes // self.machines > torch.accelerator.device_count():
            raise ValueError(
                f"Found num_processes={self.processes} on {self.machines} machine(s) with "
                f"{torch.accelerator.device_count()} device(s); set `--num_processes` to the number of devices, or "
                "`--use_cpu` to train on the CPU"
            )
        # The trainer's options decide: those of a configuration of accelerate's are for models of any kind.
        precision = "fp16" if training_args.fp16 else "bf16" if training_args.bf16 else "no"
        if self.mixed_precision not in (None, precision):
            raise ValueError(
                f"Found `mixed_precision` {self.mixed_precision} and a training with bf16={training_args.bf16} and "
                f"fp16={training_args.fp16}; leave it out and set `--bf16` or `--fp16`"
            )
        self.args.mixed_precision = precision

    def in_place(self, training_args) -> bool:
        """Whether this process can train by itself."""
        several = not training_args.use_cpu and torch.accelerator.device_count() > 1  # DataParallel
        engine = self.engine or training_args.deepspeed
        return self.processes == 1 and not engine and not several and not self._needs_launcher

    def start(self, method: str, words: list[str], prog: str) -> None:
        """
        Starts the processes and waits for them; they end with this one, however it ends.

        Args:
            method (`str`): Name of the training command.
            words (`list[str]`): Its options, without those of the launcher.
            prog (`str`): The command as the user typed it.

        Raises:
            `SystemExit`: with what one of them ended with.
        """
        args = self.args
        args.training_script_args = [method, *hide(words)]
        if args.main_process_port is None and self.machines == 1:
            args.main_process_port = 0  # any free one: two trainings may run on one machine
        os.environ[rank.LAUNCHER] = str(os.getpid())
        # They would report what the ranks and this function report.
        for name in ("agent.server.api", "multiprocessing.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
        try:
            if self.engine == "use_deepspeed":
                # Without "mixed_precision", which follows the training's options.
                args.deepspeed_fields_from_accelerate_config = ",".join(self._deepspeed_fields)
                deepspeed_launcher(args)
            else:
                multi_gpu_launcher(args)
        except SignalException as error:
            print(f"{prog}: ended by {signal.Signals(error.sigval).name}", file=sys.stderr)
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            raise SystemExit(_report(error, prog)) from None
        finally:
            del os.environ[rank.LAUNCHER]


def _refuse(message: str) -> NoReturn:
    raise ValueError(message[0].upper() + message[1:])


def _report(error: ChildFailedError, prog: str) -> int:
    """Says in one line why ranks ended, where they have not said it themselves; the exit code."""
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    for _, failure in failures:
        if isinstance(failure.message, dict):  # see `training_errors`
            print(f"{prog}: error: {failure.message['message']}", file=sys.stderr)
            return failure.exitcode
    number, failure = failures[0]
    how = _ending(failure)
    print(f"{prog}: error: rank {number} ended {how}", file=sys.stderr)
    return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode


def _ending(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"with exit code {failure.exitcode}; its own messages are above"
    name = failure.signal_name()
    return f"by {name}" + ("; the machine may have run out of memory" if name == "SIGKILL" else "")
