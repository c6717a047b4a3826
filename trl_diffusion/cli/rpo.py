"""`trl-diffusion rpo`, and the same as a script for `accelerate launch`."""

from trl_diffusion.cli.training import launch, run_script
from trl_diffusion.trainer.rpo_config import DiffusionRPOConfig


def load_trainer() -> type:
    from trl_diffusion.trainer.rpo_trainer import DiffusionRPOTrainer

    return DiffusionRPOTrainer


def run(argv: list[str]) -> None:
    """Trains; options that are not the trainer's are those of `accelerate launch`, such as `--num_processes`."""
    launch("rpo", DiffusionRPOConfig, load_trainer, argv)


def main() -> None:
    run_script(DiffusionRPOConfig, load_trainer)


if __name__ == "__main__":
    main()
