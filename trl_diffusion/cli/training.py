"""What the training commands share: parse, start processes, train, save, push."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..data.paths import folder_of, inside_only
from ..redaction import redact_argv, redacted, reveal
from ..trainer.run import check_folder, check_start
from .arguments import ModelArguments, ScriptArguments
from .errors import DEBUG, USER_ERRORS, one_line, one_line_errors, suggestion
from .inputs import ConfigParser, check_model, load_data, read_config
from .launch import Launch, as_words, launch_options
from .rank import LAUNCHER, end_with_parent


# ---- Options --------------------------------------------------------------------------------------------------------


class TrainingParser(ConfigParser):
    """
    The parser of the training's options, which knows those of the launcher too.

    Args:
        dataclass_types (iterable of `type`): The dataclasses.
        prog (`str`, *optional*): Name of the command.
    """

    def __init__(self, dataclass_types: Iterable[Any], prog: str | None = None):
        super().__init__(dataclass_types, prog=prog, allow_abbrev=False)
        self.add_argument("--config", metavar="FILE", help="YAML file with options; the command line overrides it.")

    def split(self, words: Iterable[str]) -> tuple[list[str], list[str]]:
        """
        The words of a command line that are this parser's, and those that are the launcher's, with those of the YAML
        file before them. What the file says of this parser's options becomes their default.

        Args:
            words (iterable of `str`): The command line after the command's name.

        Raises:
            `ValueError`: for an option that neither of them has.
        """
        own: list[str] = []
        launcher: list[str] = []
        target, options = own, launch_options()
        for word in words:
            name = word.split("=", 1)[0]
            if name.startswith("--") and " " not in name:  # a value with a space may begin with dashes
                if name in self._option_string_actions:
                    target = own
                elif name in options:
                    target = launcher
                else:
                    near = suggestion(name, [*self._option_string_actions, *options])
                    raise ValueError(f"Found no option {name!r}{near or f'; see `{self.prog} --help`'}")
            target.append(word)
        chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chooser.add_argument("--config", nargs="?", action="append")
        chosen = chooser.parse_known_args(own)[0].config or []
        if len(chosen) > 1:
            raise ValueError(f"Found `--config` {len(chosen)} times, expected it once; put the options into one file")
        if chosen:
            launcher = [*self._take_config(read_config([chosen[0] or "--"])), *launcher]
        return own, launcher

    def parse_own(self, words: list[str]) -> tuple[Any, ...]:
        """The dataclasses of a command line of [`split`]."""
        *parsed, strays = self.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        if strays:
            raise ValueError(f"Found the word {strays[0]!r}, which belongs to no option")
        return tuple(parsed[: len(self.dataclass_types)])

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        own, launcher = self.split(sys.argv[1:] if args is None else args)
        if launcher:
            raise ValueError(f"Found {launcher[0]!r}, which is the launcher's; expected options of the training")
        return self.parse_own(own)

    def _take_config(self, config: dict[str, Any]) -> list[str]:
        """Makes the options of a YAML file the defaults, and returns the launcher's among them."""
        redacted(config)  # remembers the secrets
        environment = config.pop("env", None) or {}
        if not isinstance(environment, dict):
            # Without the values, which may be secrets.
            raise ValueError("Found no names and values in `env` of the configuration file, expected `NAME: value`")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        actions = {action.dest: action for action in reversed(self._actions) if action.dest not in ("help", "config")}
        launcher: list[str] = []
        for key, value in config.items():
            if key in actions:
                action = actions[key]
                try:
                    action.default, action.required = self._checked(action, value), False
                except argparse.ArgumentError as error:
                    raise ValueError(
                        f"Found `{key}: {value}` in the configuration file; {error.message}"
                        f"{suggestion(str(value), map(str, action.choices or ()))}"
                    ) from None
            elif f"--{key}" in launch_options():
                launcher += as_words(key, value)
            else:
                near = suggestion(str(key), [*actions, *(name[2:] for name in launch_options())])
                end = near or f"; see `{self.prog} --help`"
                raise ValueError(f"Found the unknown option {key!r} in the configuration file{end}")
        return launcher

    def _checked(self, action: argparse.Action, value: Any) -> Any:
        """A value of a YAML file as the command line would have read it."""
        is_text = action.type in (None, str)
        if isinstance(value, dict):
            mappings = {name for kind in self.dataclass_types for name in getattr(kind, "_VALID_DICT_FIELDS", ())}
            if action.dest not in mappings:
                raise argparse.ArgumentError(None, "expected one value")
            return value
        if isinstance(value, list):
            if action.nargs == "+" and not any(isinstance(part, list | dict) for part in value):
                return self._get_values(action, list(map(str, value)))
            if action.nargs == "+" or is_text:
                return value  # pairs of numbers, or what the configuration itself knows to take apart
            raise argparse.ArgumentError(None, "expected one value")
        if value is None or (isinstance(value, bool) and is_text):
            return value
        if isinstance(value, bool) and action.choices is not None:
            raise argparse.ArgumentError(
                None, f"YAML reads an unquoted no, off, yes, on so; expected one of {list(action.choices)}, in quotes"
            )
        return self._get_values(action, [str(value)])


def make_parser(config_class, prog: str | None = None) -> TrainingParser:
    """A parser for data, training and model options, from the command line and from `--config file.yaml`."""
    return TrainingParser((ScriptArguments, config_class, ModelArguments), prog=prog)


# ---- Training -------------------------------------------------------------------------------------------------------


def load_splits(script_args: ScriptArguments, training_args) -> list[Any]:
    """
    The data to train on, and those to evaluate on where that is asked for.

    Raises:
        `ValueError`: if there is no such data set, or a split is missing.
    """
    dataset = load_data(script_args.dataset_name, script_args.dataset_config, streaming=script_args.dataset_streaming)
    splits = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    missing = [split for split in splits if split not in dataset]
    if missing:
        raise ValueError(
            f"The data set {script_args.dataset_name!r} has no split {missing[0]!r}: found {list(dataset)}; choose "
            "with `--dataset_train_split` and `--dataset_test_split`."
        )
    folder = folder_of(script_args.dataset_name)
    return [inside_only(dataset[split], folder, script_args.allow_outside) for split in splits]


def make_trainer(trainer_class, script_args: ScriptArguments, training_args, model_args: ModelArguments):
    """The trainer that the options describe."""
    check_model(model_args.model_name_or_path)
    train_dataset, *eval_dataset = load_splits(script_args, training_args)
    training_args.model_init_kwargs = model_args.init_kwargs() | (training_args.model_init_kwargs or {})
    return trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset[0] if eval_dataset else None,
        quantization_config=model_args.quantization_config(),
        peft_config=model_args.peft_config(),
    )


class _Steps(TrainerCallback):
    """Whether a step has begun, after which an error is no longer one about the input."""

    begun = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = True


def train(trainer_class, script_args: ScriptArguments, training_args, model_args: ModelArguments) -> None:
    """Trains, saves to `output_dir`, and pushes to the Hub if asked to."""
    check_start(training_args)  # before a model is loaded
    trainer = make_trainer(trainer_class, script_args, training_args, model_args)
    steps = _Steps()
    trainer.add_callback(steps)
    try:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.create_model_card(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
            trainer.accelerator.print(f"Model pushed to {trainer.hub_model_id}.")
    except USER_ERRORS as error:
        if not steps.begun:
            raise
        raise RuntimeError(f"The training failed after step {trainer.state.global_step}.") from error
    trainer.end()


@contextmanager
def training_errors(prog: str) -> Iterator[None]:
    """
    [`one_line_errors`] for one of several processes too: a launcher is told, so that it can say it once.

    Args:
        prog (`str`): The command as the user typed it.
    """
    with one_line_errors(prog):
        try:
            yield
        except (*USER_ERRORS, FloatingPointError) as error:
            code = 1 if isinstance(error, FloatingPointError) else 2
            report = os.environ.get("TORCHELASTIC_ERROR_FILE")
            if report:
                extra = {"py_callstack": one_line(error), "timestamp": str(int(time.time()))}
                Path(report).write_text(json.dumps({"message": {"message": one_line(error), "extraInfo": extra}}))
            speaks = not report or (LAUNCHER not in os.environ and os.environ.get("RANK") == "0")
            if speaks and code == 2:
                raise
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                print(redacted(traceback.format_exc()), file=sys.stderr)
            if speaks:
                print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
            raise SystemExit(code) from None


# ---- Processes ------------------------------------------------------------------------------------------------------


def launch(method: str, config_class, load_trainer: Callable[[], type], argv: list[str]) -> None:
    """
    Trains in this process, or in as many as the launcher's options ask for.

    Args:
        method (`str`): Name of the training command.
        config_class (`type`): The method's configuration.
        load_trainer (`Callable`): Imports and returns the method's trainer.
        argv (`list[str]`): The command line after the command's name.
    """
    prog = f"trl-diffusion {method}"
    with training_errors(prog):
        parser = make_parser(config_class, prog)
        own, asked = parser.split(argv)
        if "LOCAL_RANK" in os.environ:  # `torchrun --no-python trl-diffusion kto`
            _refuse_launch(asked)
            train(load_trainer(), *parser.parse_own(own))
            return
        plan = Launch(asked)
        if plan.on_cpu:
            own += ["--use_cpu", "true"]
        parsed = parser.parse_own(own)
        plan.check(parsed[1])
        if plan.in_place(parsed[1]):
            train(load_trainer(), *parsed)
        else:
            # What every rank would say, seconds later.
            check_model(parsed[2].model_name_or_path)
            load_splits(*parsed[:2])
            if not plan.args.machine_rank:  # of several machines the first one holds the folder
                check_folder(parsed[1])
            plan.start(method, own, prog)


def _refuse_launch(options: list[str]) -> None:
    """Refuses the launcher's options in a process that a launcher has started."""
    if options:
        raise ValueError(
            f"Found `{options[0].lstrip('-')}`, which starts processes, in a script that is running already; give it "
            "to `accelerate launch` or `torchrun`, or start with `trl-diffusion`"
        )


def run_script(config_class, load_trainer: Callable[[], type]) -> None:
    """
    The body of a training script, as `accelerate launch`, `torchrun` or `trl-diffusion` starts it on every rank.

    Args:
        config_class (`type`): The method's configuration.
        load_trainer (`Callable`): Imports and returns the method's trainer.
    """
    words = sys.argv[1:]
    redact_argv()
    prog = Path(sys.argv[0]).name
    ours = LAUNCHER in os.environ
    if ours:
        prog, words = f"trl-diffusion {words[0]}", [*words[1:], *reveal()]
    elif {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & os.environ.keys():  # torchrun, `accelerate launch`
        end_with_parent()
    with training_errors(prog):
        parser = make_parser(config_class, prog)
        own, asked = parser.split(words)
        if not ours:
            _refuse_launch(asked)
        train(load_trainer(), *parser.parse_own(own))
