"""The `trl-diffusion` command."""

import importlib
import os
import sys

from ..redaction import redact_argv
from .errors import DEBUG, Parser, check_options, one_line_errors, quiet_imports, quiet_libraries


COMMANDS = {
    "kto": "Diffusion-KTO: align a model with likes and dislikes",
    "rpo": "Diffusion-RPO: align a model with pairs, each winner against the losers of related prompts too",
    "dpo": "Diffusion-DPO: align a model with pairs",
    "sft": "supervised fine-tuning on chosen or liked images",
    "generate": "draw images with a base or trained model",
    "evaluate": "compare a model with a baseline: scores and win rates on the same prompts and seeds",
    "bench": "time the training step, or estimate what training takes: parameters, FLOPs, memory",
    "beta": "find the beta of a model and a data set, or convert that of another code base",
    "data": "look at preference data, or write them in the trainers' columns",
    "export": "write a trained model for other programs",
    "env": "print the versions that a bug report needs",
}


def main(argv: list[str] | None = None) -> None:
    """
    Runs `trl-diffusion <command> ...`; `trl-diffusion <command> --help` lists its options.

    An error about the input is one line on stderr and exit code 2; `--debug` prints its traceback too.
    """
    if argv is None:
        argv = sys.argv[1:]
        redact_argv()
    argv = list(argv)
    for i, word in enumerate(argv):
        # The training's own `--debug` has a value.
        if word == "--debug" and argv[i + 1 : i + 2] not in (["underflow_overflow"], ["tpu_metrics_debug"]):
            os.environ[DEBUG] = "1"
            del argv[i]
            break
    parser = Parser(prog="trl-diffusion", description="Preference alignment of diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        # Each command parses its own options, which only then have to be imported.
        commands.add_parser(name, help=text, add_help=False)
    with one_line_errors("trl-diffusion"):
        check_options(argv[:1], ["--help"], parser.prog)
        command = parser.parse_known_args(argv[:1])[0].command
    with one_line_errors(f"trl-diffusion {command}"):
        with quiet_imports():
            module = importlib.import_module(f".{command}", __name__)
        quiet_libraries()
        module.run(argv[1:])
        sys.stdout.flush()  # so that a pipe that was closed is found out here
