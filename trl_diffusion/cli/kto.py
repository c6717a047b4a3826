"""`trl-diffusion kto`, and the same as a script for `accelerate launch`."""

from trl_diffusion.cli.training import launch, run_script
from trl_diffusion.trainer.kto_config import DiffusionKTOConfig


def run(argv: list[str]) -> None:
    """Starts the training under accelerate, so that `--num_processes`, `--config_file` ... are understood."""
    launch(DiffusionKTOConfig, __file__, argv, prog="trl-diffusion kto")


def main() -> None:
    from trl_diffusion.trainer.kto_trainer import DiffusionKTOTrainer

    run_script(DiffusionKTOTrainer, DiffusionKTOConfig)


if __name__ == "__main__":
    main()
