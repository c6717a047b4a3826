"""
Trains on the tiny pipeline under each engine: `train_engine.py JOBS`, a JSON file with a list of `{"engine", "ranks",
"runs", "log"}`, in whose place it writes a list that says which of them ended well.

Ranks are forked from one process, because importing everything takes longer than all the runs.
"""

import copy
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import get_last_checkpoint


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.conftest import embed, pairs, unpaired
from tests.methods import METHODS
from trl_diffusion import engines


def zero(stage: int, threshold: int | str = 0) -> dict:
    """As a user writes it, but for the threshold: below it parameters stay whole, most of the tiny model too."""
    sizes = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"]
    if stage != 1:  # there it is left out, with which it has to be `max_grad_norm` too
        sizes.append("gradient_clipping")
    return dict.fromkeys(sizes, "auto") | {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": threshold,
        },
    }


ENGINES: dict[str, dict] = {
    "ddp": {},
    **{f"zero{stage}": {"deepspeed": zero(stage)} for stage in (1, 2, 3)},
    "zero3 auto": {"deepspeed": zero(3, "auto")},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}},
}


def allow_fsdp_on_a_cpu() -> None:
    """accelerate gives FSDP to accelerators only; on a CPU it would train with DDP, without a word."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched
    engines.check_fsdp = lambda args: None


def placement(module: torch.nn.Module) -> str:
    """Where the parameters lie: "whole", "zero3" or "fsdp2"; several, joined by a plus, if not all alike."""

    def one(parameter: torch.nn.Parameter) -> str:
        if isinstance(parameter, DTensor):
            return "fsdp2" if any(place.is_shard() for place in parameter.placements) else "replicated"
        part = getattr(parameter, "ds_tensor", None)
        if part is None:
            return "whole"
        return "zero3" if parameter.numel() == 0 and part.numel() < parameter.ds_numel else "kept whole"

    return "+".join(sorted({one(parameter) for parameter in module.parameters()}))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_fault(trainer, when: str, ranks: list[int], step: int) -> None:
    """
    At an optimizer step, some ranks are killed in its midst (`when="step"`) or in the midst of its checkpoint
    (`"checkpoint"`), or can write no more than so many bytes a file, as with a full disk (`"disk 100000"`).
    """
    if trainer.args.process_index not in ranks:
        return
    kind, _, size = when.partition(" ")
    # The random state is the last part of a checkpoint but one.
    name = {"step": "training_step", "checkpoint": "_save_rng_state", "disk": "_save_checkpoint"}[kind]
    original = getattr(trainer, name)

    def faulty(*args, **kwargs):
        if trainer.state.global_step == step:
            if kind == "disk":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing raises
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
            else:
                original(*args, **kwargs)
                die()
        return original(*args, **kwargs)

    setattr(trainer, name, faulty)


def deadly_embed(images, prompts):
    """Kills its rank in the second batch."""
    deadly_embed.calls = getattr(deadly_embed, "calls", 0) + 1
    if deadly_embed.calls == 2:
        die()
    return embed(images, prompts)


def train(
    engine: str,
    model: str,
    output_dir: str,
    method: str = "kto",
    lora: bool = False,
    resume: str | None = None,
    fault: dict | None = None,
    refused: bool = False,
    by_rank: dict | None = None,
    **options,
) -> None:
    """
    With the arguments of the configuration and of [`make_fault`].

    Args:
        model (`str`): Folder of the pipeline.
        resume (`str`, *optional*): A checkpoint, or "last" for the last one of the folder, if any.
        refused (`bool`, *optional*): Whether a `ValueError` is expected, whose text is written down.
        by_rank (`dict`, *optional*): Options, and `rows` of the training data, with one value for each rank.
    """
    rank = int(os.environ.get("RANK", 0))
    options |= {name: values[rank] for name, values in (by_rank or {}).items()}
    rows = options.pop("rows", 12)
    if resume == "last":
        resume = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    in_cache = fault is not None and fault["when"] == "cache"
    config_class, trainer_class, *_ = METHODS[method]
    data = unpaired if method == "kto" else pairs
    engine_options = copy.deepcopy(ENGINES[engine])  # the configuration is filled in place
    try:
        trainer = trainer_class(
            # From a folder, where ZeRO-3 would partition the text encoder as it is loaded.
            model=model,
            args=config_class(
                output_dir,
                use_cpu=True,
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
                **engine_options,
                **options,
            ),
            train_dataset=data(rows),
            eval_dataset=data(7),
            peft_config=LoraConfig(r=4, lora_alpha=8) if lora else None,
            **(
                {"embedder": deadly_embed if in_cache and rank in fault["ranks"] else embed} if method == "rpo" else {}
            ),
        )
        if fault is not None and not in_cache:
            make_fault(trainer, **fault)
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        if not refused:
            raise
        os.makedirs(output_dir, exist_ok=True)
        Path(output_dir, f"refused-{rank}").write_text(str(error))
        return
    assert not refused, "it went on"
    results = {
        "train": [entry for entry in trainer.state.log_history if "loss" in entry],
        "eval": trainer.evaluate(),
        "engine": trainer.accelerator.distributed_type.value,
        "frozen": placement(torch.nn.ModuleList(trainer.family.frozen_modules.values())),
    }
    if trainer.reference is not None and trainer.reference.model is not None:
        # ZeRO-3 expects another forward of it, and has begun to gather.
        results["reference"] = placement(trainer.reference.at_rest() if "zero3" in engine else trainer.reference.model)
    trainer.save_model()
    # After saving, which leaves no parameter gathered.
    results["policy"] = placement(trainer.model)
    if trainer.is_world_process_zero():
        Path(output_dir, "log.json").write_text(json.dumps(results))


def run_ranks(job: dict, port: int) -> bool:
    """One process per rank, forked from this one, which has imported everything; whether all of them ended well."""
    children = set()
    for rank in range(job["ranks"]):
        child = os.fork()
        if child:
            children.add(child)
            continue
        code = 1
        try:
            log = open(f"{job['log']}.{rank}", "w", buffering=1)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            if job["ranks"] > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": port}
                os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
            if job["engine"] == "fsdp2":
                allow_fsdp_on_a_cpu()
            for run in job["runs"]:
                train(**{"engine": job["engine"]} | run)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    failed = False
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not failed:  # as torchrun does: the others would wait for it for ever
            failed = True
            time.sleep(1)  # for what they have to say themselves
            for other in children:
                os.kill(other, signal.SIGKILL)
    return not failed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if any("deepspeed" in ENGINES[job["engine"]] for job in jobs):
        import deepspeed

        # It would compile collectives through shared memory, which takes minutes; gloo's do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ended_well = [run_ranks(job, free_port()) for job in jobs]
    Path(sys.argv[1]).write_text(json.dumps(ended_well))
