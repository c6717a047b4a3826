"""`trl-diffusion dpo`, and the same as a script for `accelerate launch`."""

from trl_diffusion.cli.training import launch, run_script
from trl_diffusion.trainer.dpo_config import DiffusionDPOConfig


def load_trainer() -> type:
    from trl_diffusion.trainer.dpo_trainer import DiffusionDPOTrainer

    return DiffusionDPOTrainer


def run(argv: list[str]) -> None:
    """Trains; options that are not the trainer's are those of `accelerate launch`, such as `--num_processes`."""
    launch("dpo", DiffusionDPOConfig, load_trainer, argv)


def main() -> None:
    run_script(DiffusionDPOConfig, load_trainer)


if __name__ == "__main__":
    main()
