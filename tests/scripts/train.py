"""Trains on the tiny pipeline and writes losses, metrics and weights; started by torchrun on one or more ranks."""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import test_buckets
from tests.conftest import pairs, unpaired
from tests.methods import make_trainer
from tests.tiny import tiny_stable_diffusion
from trl_diffusion.data.formats import EMBEDDING_COLUMNS


def train(
    output_dir: str,
    method: str = "kto",
    lora: bool = False,
    resume: str | None = None,
    stream: bool = False,
    buckets: bool = False,
    rows: int | None = None,
    liked: float | None = None,
    **options,
) -> None:
    of_all_shapes = (test_buckets.unpaired, test_buckets.pairs)
    data = (of_all_shapes if buckets else (unpaired, pairs))[method != "kto"]
    train_dataset = data() if rows is None else data(rows)
    if liked is not None:
        labels = [i < liked * len(train_dataset) for i in range(len(train_dataset))]
        train_dataset = train_dataset.remove_columns("label").add_column("label", labels)
    trainer = make_trainer(
        method,
        tiny_stable_diffusion(),
        output_dir,
        data(40).to_iterable_dataset() if stream else train_dataset,
        eval_dataset=data(7),
        peft_config=LoraConfig(r=4, lora_alpha=8) if lora else None,
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        policy = trainer.accelerator.unwrap_model(trainer.model)
        trained = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
        save_file(trained, f"{output_dir}/trained.safetensors")
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        results = {"train": log, "eval": evaluation}
        if method == "rpo":
            results["embeddings"] = [trainer.train_dataset[name][:] for name in EMBEDDING_COLUMNS]
        Path(output_dir, "log.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in json.loads(sys.argv[1]):  # several in one process, because starting one takes longer than a run
        train(**run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
