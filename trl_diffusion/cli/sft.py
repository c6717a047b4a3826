"""`trl-diffusion sft`, and the same as a script for `accelerate launch`."""

from trl_diffusion.cli.training import launch, run_script
from trl_diffusion.trainer.sft_config import DiffusionSFTConfig


def load_trainer() -> type:
    from trl_diffusion.trainer.sft_trainer import DiffusionSFTTrainer

    return DiffusionSFTTrainer


def run(argv: list[str]) -> None:
    """Trains; options that are not the trainer's are those of `accelerate launch`, such as `--num_processes`."""
    launch("sft", DiffusionSFTConfig, load_trainer, argv)


def main() -> None:
    run_script(DiffusionSFTConfig, load_trainer)


if __name__ == "__main__":
    main()
