"""What the training commands share: parse, hand over to accelerate, train, save, push."""

from importlib.resources import files
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import load_dataset
from trl import TrlParser

from ..trainer.run import check_start
from .arguments import ModelArguments, ScriptArguments


def make_parser(config_class, prog: str | None = None) -> TrlParser:
    """A parser for data, training and model options, from the command line and from `--config file.yaml`."""
    return TrlParser((ScriptArguments, config_class, ModelArguments), prog=prog)


def make_trainer(trainer_class, script_args: ScriptArguments, training_args, model_args: ModelArguments):
    """The trainer that the options describe."""
    dataset = load_dataset(
        script_args.dataset_name, script_args.dataset_config, streaming=script_args.dataset_streaming
    )
    splits = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    missing = [split for split in splits if split not in dataset]
    if missing:
        raise ValueError(
            f"The data set {script_args.dataset_name!r} has no split {missing[0]!r}: found {list(dataset)}; choose "
            "with `--dataset_train_split` and `--dataset_test_split`."
        )
    training_args.model_init_kwargs = model_args.init_kwargs() | (training_args.model_init_kwargs or {})
    return trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[splits[0]],
        eval_dataset=dataset[splits[1]] if len(splits) > 1 else None,
        quantization_config=model_args.quantization_config(),
        peft_config=model_args.peft_config(),
    )


def train(trainer_class, script_args: ScriptArguments, training_args, model_args: ModelArguments) -> None:
    """Trains, saves to `output_dir`, and pushes to the Hub if asked to."""
    check_start(training_args)  # before a model is loaded
    trainer = make_trainer(trainer_class, script_args, training_args, model_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to {trainer.hub_model_id}.")
    trainer.end()


def run_script(trainer_class, config_class) -> None:
    """The body of a training script, as `accelerate launch` starts it on every rank."""
    parsed = make_parser(config_class).parse_args_and_config(fail_with_unknown_args=False)
    train(trainer_class, *parsed[:3])


def launch(config_class, script: str, argv: list[str], prog: str) -> None:
    """
    Starts `script` under `accelerate launch`; options that are not the trainer's are accelerate's.

    Args:
        config_class: The method's configuration.
        script (`str`): Path of the training script.
        argv (`list[str]`): The command line after the command's name.
        prog (`str`): Name of the command in its help.
    """
    *_, from_config, unknown = make_parser(config_class, prog).parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    # What is left of the command line without the unknown options, which stand in it in the same order.
    own, rest = [], list(unknown)
    for word in argv:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            own.append(word)
    options = resolve_accelerate_config([*from_config, *unknown])
    launch_command(launch_command_parser().parse_args([*options, script, *own]))


def resolve_accelerate_config(options: list[str]) -> list[str]:
    """
    Turns `--accelerate_config NAME` into accelerate's `--config_file`, as TRL does.

    Args:
        options (`list[str]`): Options of `accelerate launch`; `NAME` is a file, or one of `accelerate_configs/`.

    Raises:
        `ValueError`: if there is neither such a file nor such a name, or nothing follows the option.
    """
    # Both spellings of argparse: `--option value` and `--option=value`.
    words = [
        part
        for word in options
        for part in (word.split("=", 1) if word.startswith("--accelerate_config=") else [word])
    ]
    if "--accelerate_config" not in words:
        return options
    place = words.index("--accelerate_config")
    name = words[place + 1] if place + 1 < len(words) else ""
    folder = files("trl_diffusion") / "accelerate_configs"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if Path(name).is_file():
        path = name
    elif name in known:
        path = str(folder / f"{name}.yaml")
    else:
        raise ValueError(f"Found `--accelerate_config {name}`, expected a file or one of {known}.")
    return [*words[:place], "--config_file", path, *words[place + 2 :]]
