"""What of a training reaches the disk and the Hub: checkpoints, weights, the model card."""

import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from transformers.trainer import SCHEDULER_NAME, PushInProgress, hf_api
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl.trainer.base_trainer import _BaseTrainer

from .. import card, engines, files, hub
from ..ema import EMACallback
from ..families import Family
from ..reference import Reference
from .run import Run, damage_named


class SavingTrainer(_BaseTrainer):
    """
    Writes and reads what [`DiffusionTrainer`] trains, in one way under every engine: whole or not at all, weights as
    safetensors only.
    """

    family: Family
    reference: Reference | None
    ema: EMACallback | None
    run: Run

    # The folder of a checkpoint that is being written.
    _staging: str | None = None
    push_in_progress: PushInProgress | None = None
    _first_bad_step: torch.Tensor

    def _stop_if_not_finite(self) -> None:
        """Raises `FloatingPointError` on all ranks where a loss or a gradient was not finite."""
        raise NotImplementedError

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the checkpoint beside its place and renames it when it is whole."""
        output_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = output_dir / files.INCOMPLETE
        self.run.check_still_ours()
        self._check_weights()
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
                self.run.record_checkpoint(staging / name)
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
            self.run.rotate(output_dir / name, self.state.best_model_checkpoint)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As [`~transformers.Trainer.train`]; see [`Run.started`]. A run that is finished is loaded, and no more."""
        with self.run.started(resume_from_checkpoint) as checkpoint:
            if checkpoint is not None and self._load_finished(checkpoint):
                return TrainOutput(self.state.global_step, math.nan, {})
            output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            self._stop_if_not_finite()
            self._check_weights()
            self.run.finish(self.state.global_step, self.state.max_steps)
        return output

    def _load_finished(self, checkpoint: Path) -> bool:
        """Loads a run of which nothing is left to train; False, and does nothing, if there is something."""
        dataloader = self.get_train_dataloader()
        epochs, steps_per_epoch, *_, max_steps = self.set_initial_training_values(self.args, dataloader)
        best = self.args.load_best_model_at_end
        if not engines.on_first_rank(lambda: self.run.is_finished(checkpoint, max_steps, best)):
            return False
        self._init_training_state(max_steps, steps_per_epoch, epochs, str(checkpoint), None)
        # As `Trainer` does before its first step: sharded weights are loaded after the engine has taken the model.
        if engines.engine_of(self.accelerator) == "replicated":
            self._load_from_checkpoint(str(checkpoint))
        self._prepare_for_training(max_steps, dataloader, str(checkpoint))
        if best and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self._rotate_at_end(checkpoint)
        self.accelerator.print(
            f"The run in {self.args.output_dir} is finished: its last checkpoint is of step {self.state.global_step} "
            f"of {max_steps}, and nothing is left to train."
        )
        return True

    def _finalize_training(self, *args, **kwargs):
        # transformers deletes checkpoints here, see `Run.rotate`.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self._rotate_at_end(Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
        return output

    def _rotate_at_end(self, last: Path) -> None:
        """As transformers does: where one checkpoint is kept and the best is known, it is that one."""
        best = self.state.best_model_checkpoint
        if self.args.should_save:
            only_best = best is not None and self.args.save_total_limit == 1
            self.run.rotate(Path(best) if only_best else last, best)

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Raises `FloatingPointError` on all ranks where a trained weight is not finite."""
        policy = engines.at_rest(self.model_wrapped, self.accelerator)
        parts = [part for part in engines.local_parts(policy, trained=True) if part.is_floating_point()]
        bad = torch.zeros_like(self._first_bad_step)
        for part in parts:
            bad += (~part.isfinite()).any().to(bad.device)
        if self.accelerator.gather(bad.reshape(1)).any():
            raise FloatingPointError(
                f"The weights are not finite after step {self.state.global_step}: lower `learning_rate`; nothing of "
                f"this step is saved, and checkpoints in {self.args.output_dir} are from before."
            )

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
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
        if self.args.sync_ref_model and self.reference is not None:
            hub.load_weights(self.reference.at_rest(), checkpoint / hub.REFERENCE)
        if self.ema is not None:
            self.ema.load(checkpoint / hub.EMA)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`], in one way under every engine; `ema_export` saves the average."""
        ema = self.ema if self.args.ema_export and self._staging is None else None
        if self._staging is not None:  # of a checkpoint
            self._save(output_dir)
        else:
            folder = Path(output_dir or self.args.output_dir)
            with self.run.saving(folder), nullcontext() if ema is None else ema.in_place_of_the_weights():
                self._check_weights()
                self._save(str(folder))
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
        with damage_named(resume_from_checkpoint):
            hub.load_policy(policy, self.family, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with damage_named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with damage_named(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with damage_named(checkpoint):
            super()._load_rng_state(checkpoint)

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
