"""What of a training reaches the disk and the Hub: checkpoints, weights, the model card."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from transformers.trainer import SCHEDULER_NAME, PushInProgress, hf_api, rotate_checkpoints
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.base_trainer import _BaseTrainer

from .. import card, engines, files, hub
from ..ema import EMACallback
from ..families import Family
from ..reference import Reference


class SavingTrainer(_BaseTrainer):
    """
    Writes and reads what [`DiffusionTrainer`] trains, in one way under every engine: whole or not at all, weights as
    safetensors only.
    """

    family: Family
    reference: Reference | None
    ema: EMACallback | None

    # The folder of a checkpoint that is being written.
    _staging: str | None = None
    push_in_progress: PushInProgress | None = None

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the checkpoint beside its place and renames it when it is whole."""
        output_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = output_dir / files.INCOMPLETE
        try:
            if self.args.should_save:
                self.create_model_card()
                files.clear_staging(output_dir)
            self.accelerator.wait_for_everyone()
            self._staging = str(staging)
            super()._save_checkpoint(model, trial)
            self._save_beside_weights(staging / name)
            self.accelerator.wait_for_everyone()
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).parent == staging:
                self.state.best_model_checkpoint = str(output_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
                files.put_in_place(staging / name, output_dir / name)
        # A full disk is an OSError to Python, an error of its own to safetensors, and a RuntimeError to torch.
        except (OSError, SafetensorError, RuntimeError) as error:
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to {output_dir}: {error}; "
                "earlier checkpoints are whole: if the disk is full make room (`save_total_limit` keeps fewer), and "
                "resume."
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output_dir / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if resume_from_checkpoint is not None:
            engines.check_checkpoint(resume_from_checkpoint, self.accelerator)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._load_beside_weights(Path(resume_from_checkpoint))
        return prepared

    def _save_beside_weights(self, checkpoint: Path) -> None:
        """What of a checkpoint is neither the policy nor its optimizer: a reference that moves, the moving average."""
        if self.args.sync_ref_model and self.reference is not None:
            weights = engines.whole(engines.own_tensors(self.reference.at_rest()), keep=self.args.should_save)
            if self.args.should_save:
                hub.save_weights(weights, checkpoint / hub.REFERENCE)
        if self.ema is not None:
            with self.ema.in_place_of_the_weights():
                self._save(str(checkpoint / hub.EMA))

    def _load_beside_weights(self, checkpoint: Path) -> None:
        parts = {hub.REFERENCE: ("sync_ref_model", self.args.sync_ref_model), hub.EMA: ("ema_decay", bool(self.ema))}
        for name, (option, wanted) in parts.items():
            if (checkpoint / name).is_dir() != wanted:
                raise ValueError(
                    f"Found {'no' if wanted else 'a'} folder {name!r} in {checkpoint}, which goes with `{option}`: "
                    "resume with the first run's value."
                )
        if self.args.sync_ref_model and self.reference is not None:
            hub.load_weights(self.reference.at_rest(), checkpoint / hub.REFERENCE)
        if self.ema is not None:
            self.ema.load(checkpoint / hub.EMA)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`], in one way under every engine; `ema_export` saves the average."""
        ema = self.ema if self.args.ema_export and self._staging is None else None
        with nullcontext() if ema is None else ema.in_place_of_the_weights():
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if engines.engine_of(self.accelerator) != "fsdp2":
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the weights a second time.
        engines.save_optimizer(self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        policy = engines.at_rest(self.model_wrapped, self.accelerator)
        weights = engines.whole(hub.trained_tensors(policy), keep=self.args.should_save)  # by all ranks
        if not self.args.should_save:
            return
        with files.written_whole(output_dir or self.args.output_dir) as staging:
            hub.save_policy(policy, self.family, staging, weights)
            hub.save_training_args(self.args, staging)
            if self._staging is None and not is_peft_model(policy):
                hub.save_frozen_parts(self.family, staging)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        policy = engines.at_rest(self.model_wrapped if model is None else model, self.accelerator)
        hub.load_policy(policy, self.family, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None):
        """Writes `README.md` of the output folder, and the pictures in it; see [`card.model_card`]."""
        if self.is_world_process_zero():
            os.makedirs(self.args.output_dir, exist_ok=True)
            card.draw_pictures(self)
            text = card.model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags)
            text.save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """As [`~transformers.Trainer.push_to_hub`], without the paths of this machine, see [`hub.upload_folder`]."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)  # by all ranks
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault("model_name", (self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1])
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return hub.upload_folder(
            hf_api(),
            Path(self.args.output_dir),
            repo_id=self.hub_model_id,
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"],
            revision=self.args.hub_revision if revision is None else revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None:  # called by Trainer before the checkpoint is whole
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        pushing = self.push_in_progress
        running = pushing is not None and not pushing.is_done()
        if running and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        jobs = hub.upload(hf_api(), self, Path(checkpoint_folder))
        if pushing is not None and running:
            pushing.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
