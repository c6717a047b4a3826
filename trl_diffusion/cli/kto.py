"""`trl-diffusion kto`, and the same as a script for `accelerate launch`."""

from trl_diffusion.cli.training import launch, run_script
from trl_diffusion.trainer.kto_config import DiffusionKTOConfig


def load_trainer() -> type:
    from trl_diffusion.trainer.kto_trainer import DiffusionKTOTrainer

    return DiffusionKTOTrainer


def run(argv: list[str]) -> None:
    """Trains; options that are not the trainer's are those of `accelerate launch`, such as `--num_processes`."""
    launch("kto", DiffusionKTOConfig, load_trainer, argv)


def main() -> None:
    run_script(DiffusionKTOConfig, load_trainer)


if __name__ == "__main__":
    main()
