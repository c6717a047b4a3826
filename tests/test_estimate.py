"""`trl-diffusion bench --estimate`: published numbers, and small models of which the true numbers can be had."""

import copy
import functools
import re
from contextlib import nullcontext

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from tests import tiny
from tests.test_families import trainer_of
from trl_diffusion.bench import estimate as bench
from trl_diffusion.bench.estimate import (
    Mode,
    build,
    estimate,
    inputs_of,
    published_models,
    tensors_of,
    training_memory,
)
from trl_diffusion.cli import main
from trl_diffusion.families import family_class


PUBLISHED = {
    "sd15": (859_520_964, 206_714_343),
    "sdxl": (2_567_463_684, 901_374_183),
    # Its file of 2.47 B holds the table of positions too.
    "sd35-medium": (2_243_171_520, 5_664_440_483),
    "flux-dev": (11_901_408_320, 4_969_190_819),
}
TINY = {
    "sd": ("StableDiffusionPipeline", {"sample": ["B", 4, 8, 8], "encoder_hidden_states": ["B", 5, 16]}),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {
            "sample": ["B", 4, 8, 8],
            "encoder_hidden_states": ["B", 5, 32],
            "added_cond_kwargs": {"text_embeds": ["B", 16], "time_ids": ["B", 6]},
        },
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        {"hidden_states": ["B", 4, 8, 8], "encoder_hidden_states": ["B", 5, 32], "pooled_projections": ["B", 32]},
    ),
    "flux": (
        "FluxPipeline",
        {
            "hidden_states": ["B", 16, 16],
            "guidance": ["B"],
            "encoder_hidden_states": ["B", 5, 16],
            "pooled_projections": ["B", 16],
            "txt_ids": [5, 3],
            "img_ids": [16, 3],
        },
    ),
}
PIPELINES = {
    "sd": tiny.tiny_stable_diffusion,
    "sdxl": tiny.tiny_stable_diffusion_xl,
    "sd3": tiny.tiny_stable_diffusion_3,
    "flux": tiny.tiny_flux,
}


@functools.cache
def published(name: str) -> dict:
    """A tiny model as if it were a published one; without dropout, which keeps masks."""
    pipeline_class, inputs = TINY[name]
    denoiser = getattr(PIPELINES[name](), family_class(pipeline_class).denoiser_name)
    config = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
    return {
        "name": name,
        "resolution": 16,
        "pipeline_class": pipeline_class,
        "denoiser": {"class": type(denoiser).__name__, "config": config | ({"dropout": 0.0} if name == "sd" else {})},
        "inputs": {"timestep": ["B"]} | inputs,
        "frozen": [],
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name):
    model = published_models()[name]
    parameters, encoders = PUBLISHED[name]
    assert sum(p.numel() for p in build(model["denoiser"]).parameters()) == parameters
    assert sum(p.numel() for part in model["frozen"] for p in build(part).parameters()) == encoders


def test_every_published_model_is_tested():
    assert list(published_models()) == list(PUBLISHED)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", TINY)
def test_fake_tensors_save_what_real_ones_do(name, rank, bf16):
    mode = Mode(rank, bf16)
    fake = training_memory(published(name), mode, 3, 7)
    real = training_memory(published(name), mode, 3, 7, nullcontext())
    if not bf16:
        assert fake == real
    # Kernels of the CPU keep some statistics of bfloat16 in another dtype than the fake tensors do.
    assert fake.activations == pytest.approx(real.activations, rel=0.02)
    assert fake.checkpointed == pytest.approx(real.checkpointed, rel=0.02)
    alone = training_memory(published(name), mode, 1, 7)
    assert alone.activations < fake.activations < 3.5 * alone.activations
    assert alone.weights == fake.weights


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", TINY)
def test_activations_are_those_of_a_forward(name, rank):
    """Counted without any of the estimate's own code: the storages that a forward's graph holds on to."""
    model, memory = published(name), training_memory(published(name), Mode(rank), 2, 0)
    policy = build(model["denoiser"])
    if rank is not None:
        targets = family_class(model["pipeline_class"]).lora_targets
        with torch.device("meta"):
            policy = bench.get_peft_model(
                policy.requires_grad_(False), bench.LoraConfig(r=rank, target_modules=targets)
            )
    weights = tensors_of(policy)
    own = {t.untyped_storage().data_ptr() for t in weights.values()}

    def saved(checkpointing: bool) -> int:
        found, alive = {}, []

        def pack(tensor):
            alive.append(tensor)
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        if checkpointing:
            policy.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
        inputs = inputs_of(model, 2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            functional_call(policy, weights, (), inputs | {"return_dict": False})
        return sum(found.values())

    assert memory.activations == saved(False)
    kept = saved(True)
    assert kept < memory.checkpointed < memory.activations
    # What is above it is one block's.
    assert memory.checkpointed - kept < memory.activations / 2 or name in ("flux", "sd3")  # of one or two blocks


# A UNet's group norms do not run on a CPU with weights in bfloat16.
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_four_bits_are_those_of_bitsandbytes(name):
    """The layers themselves run on a CPU, where diffusers refuses to load a model with them."""
    bnb = pytest.importorskip("bitsandbytes")
    model = published(name)
    policy = build(model["denoiser"], "cpu").requires_grad_(False).bfloat16()
    for parent in list(policy.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                packed = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=False,
                    quant_type="nf4",
                ).bfloat16()
                packed.load_state_dict(layer.state_dict())
                setattr(parent, child, packed.requires_grad_(False).to("cpu"))
    layers = [module for module in policy.modules() if isinstance(module, bnb.nn.Linear4bit)]
    scales = bench.num_bytes(layer.weight.quant_state.absmax for layer in layers)
    targets = set(family_class(model["pipeline_class"]).lora_targets)
    policy = bench.get_peft_model(policy, bench.LoraConfig(r=4, target_modules=targets)).train()
    tensors = [*policy.parameters(), *policy.buffers()]
    memory = training_memory(model, Mode(4, bf16=True, four_bit=True), 2, 0)
    assert bench.num_bytes(tensors) + scales == memory.weights

    saved = bench.SavedTensors(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        # Held until it is counted, or its storages would be given to other tensors.
        answer = saved.count(policy.base_model.model, lambda: policy(**inputs_of(model, 2)))
    assert answer is not None
    # Kernels of the CPU keep some statistics in another dtype, as above.
    assert saved.bytes == pytest.approx(memory.activations, rel=0.02)


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", TINY)
def test_bytes_of_a_training(tmp_path, name, rank):
    """Weights, gradients and optimizer states of a true trainer after a step."""
    peft_config = None if rank is None else bench.LoraConfig(r=rank)
    trainer = trainer_of(tmp_path, PIPELINES[name](), "dpo", peft_config, max_steps=1, resolution=16)
    found = {}
    trainer.add_callback(Gradients(trainer, found))
    trainer.train()
    memory = training_memory(published(name), Mode(rank), 1, 0)
    assert found["gradients"] == memory.gradients
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if t.numel() > 1]
    weights = [*trainer.model.parameters(), *trainer.model.buffers()]
    assert sum(t.numel() * t.element_size() for t in weights) == memory.weights
    single = sum(2 * p.element_size() for p in trainer.model.parameters() if p.requires_grad and p.numel() == 1)
    assert sum(t.numel() * t.element_size() for t in states) + single == memory.optimizer
    reference = trainer.reference.model
    copied = 0 if reference is None else sum(p.numel() * p.element_size() for p in reference.parameters())
    assert copied == memory.reference


class Gradients(TrainerCallback):
    def __init__(self, trainer, found):
        self.trainer, self.found = trainer, found

    def on_pre_optimizer_step(self, *args, **kwargs):
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        self.found["gradients"] = sum(g.numel() * g.element_size() for g in gradients)


class Attention(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) > 2 else (kwargs[n] for n in ("query", "key", "value"))
            self.flops += 2 * query.numel() * key.shape[-2] + 2 * query.shape[:-1].numel() * value.shape[-2:].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TINY)
def test_flops(name):
    """Two for each multiplication of linear layers, convolutions and attention, counted layer by layer."""
    flops = []

    def count(module, args, answer):
        inputs = module.in_features if isinstance(module, torch.nn.Linear) else module.weight[0].numel()
        flops.append(2 * answer.numel() * inputs)

    denoiser = build(published(name)["denoiser"])
    for module in denoiser.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(count)
    attention = Attention()
    with attention, torch.no_grad():
        functional_call(denoiser, tensors_of(denoiser), (), inputs_of(published(name), 1))
    assert attention.flops > 0
    counted = sum(flops) + attention.flops
    found = estimate(published(name), modes=[]).flops
    # Tables of positions are multiplied out too.
    assert counted <= found < 1.01 * counted


def test_what_a_run_needs():
    memory = bench.Memory(
        weights=1, gradients=2, optimizer=4, reference=8, encoders=16, activations=32, checkpointed=64
    )
    assert memory.total(checkpointing=False, reference=True, cached_features=False) == 63
    assert memory.total(checkpointing=True, reference=False, cached_features=True) == 71


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr("trl_diffusion.cli.bench.published_models", lambda: {"tiny": copy.deepcopy(published("flux"))})
    main(["bench", "--estimate", "--batch_size", "2", "--lora_r", "4"])
    text = capsys.readouterr().out
    assert "**flux**, 16 pixels, 2 image(s) in a micro-batch: 0.00 B parameters (" in text
    for mode in ("full, fp32", "full, bf16", "LoRA r=4, fp32", "LoRA r=4, bf16", "LoRA r=4, bf16, 4 bit"):
        assert f"| {mode} | 0.0 |" in text


def test_four_bits_are_not_trained():
    with pytest.raises(ValueError, match=r"Found `four_bit` without `lora_rank`.*set a rank"):
        Mode(four_bit=True)


# ---- Several devices, other sizes, a training's options -------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("none", (800, 80, 160, 800)),
        ("zero1", (800, 80, 54, 800)),
        ("zero2", (800, 27, 54, 800)),
        ("zero3", (267, 27, 54, 267)),
        ("fsdp", (267, 27, 54, 267)),
    ],
)
def test_three_devices_share_what_the_engine_shards(engine, expected):
    """By hand, rounded up; encoders and activations are each device's."""
    memory = bench.Memory(
        weights=800, gradients=80, optimizer=160, reference=800, encoders=7, activations=5, checkpointed=3
    ).per_device(engine, 3)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.reference) == expected
    assert (memory.encoders, memory.activations, memory.checkpointed) == (7, 5, 3)


@pytest.mark.parametrize(
    ("engine", "bytes_per_parameter"),
    [("none", 20), ("zero1", 12 + 8 / 8), ("zero2", 8 + 12 / 8), ("zero3", 20 / 8), ("fsdp", 20 / 8)],
)
def test_full_fine_tuning_takes_what_the_scaling_guide_says(engine, bytes_per_parameter):
    found = estimate(published("sd"), modes=[Mode()], engine=engine, num_processes=8)
    memory = found.memory[Mode()]
    total = memory.weights + memory.gradients + memory.optimizer + memory.reference
    assert total == pytest.approx(bytes_per_parameter * found.parameters, abs=8)


def test_inputs_of_the_published_models():
    """At the default size what the pipelines give the denoiser; at another size only the images' inputs change."""
    with FakeTensorMode():
        shapes = {
            name: {key: tuple(value.shape) for key, value in inputs_of(model, 2).items() if hasattr(value, "shape")}
            for name, model in published_models().items()
        }
        small = inputs_of(bench.at_resolution(published_models()["flux-dev"], 512), 2)
    assert shapes["sd15"]["sample"] == (2, 4, 64, 64)
    assert shapes["sdxl"]["sample"] == (2, 4, 128, 128)
    assert shapes["sd35-medium"]["hidden_states"] == (2, 16, 128, 128)
    assert shapes["flux-dev"]["hidden_states"] == (2, 4096, 64)
    assert shapes["flux-dev"]["img_ids"] == (4096, 3)
    changed = {
        key: tuple(value.shape) for key, value in small.items() if tuple(value.shape) != shapes["flux-dev"][key]
    }
    assert changed == {"hidden_states": (2, 1024, 64), "img_ids": (1024, 3)}


@pytest.mark.parametrize("resolution", [0, 32, 100])
def test_sizes_that_no_model_takes(resolution):
    with pytest.raises(ValueError, match=f"Found resolution={resolution}, expected a multiple of 16 from 64 on"):
        bench.at_resolution(published("sd"), resolution)


GIB = 2**30
RECIPE = {
    "model_name_or_path": "some/one",
    "dataset_name": "x",
    "output_dir": "x",
    "per_device_train_batch_size": 3,
    "resolution": 512,
    "bf16": False,
    "accelerate_config": "zero2",
    "num_processes": 4,
    "gradient_checkpointing": False,
    "ema_decay": 0.9,
}


@pytest.mark.parametrize(
    ("changes", "options", "mode", "batch_size", "processes", "expected"),
    [
        # Weights, a quarter of gradients and optimizer, the reference, encoders, activations, the average.
        ({}, [], Mode(), 3, 4, 40 + 10 + 20 + 40 + 5 + 7 + 40),
        ({}, ["--method", "dpo"], Mode(), 6, 4, 40 + 10 + 20 + 40 + 5 + 7 + 40),
        ({}, ["--method", "sft"], Mode(), 3, 4, 40 + 10 + 20 + 5 + 7 + 40),
        ({"precompute_ref_log_probs": True, "cache_features": True}, [], Mode(), 3, 4, 40 + 10 + 20 + 7 + 40),
        ({"activation_checkpointing": True, "ema_decay": None}, [], Mode(), 3, 4, 40 + 10 + 20 + 40 + 5 + 2),
        ({}, ["--engine", "fsdp", "--num_processes", "8"], Mode(), 3, 8, 5 + 5 + 10 + 5 + 5 + 7 + 5),
        ({"accelerate_config": "multi_gpu"}, [], Mode(), 3, 4, 40 + 40 + 80 + 40 + 5 + 7 + 40),
        ({"use_peft": True, "bf16": True}, [], Mode(16, True, float32_base=True), 3, 4, 162),
        ({"use_peft": True, "lora_r": 4, "bf16": True, "dtype": "bfloat16"}, [], Mode(4, True), 3, 4, 162),
        ({"use_peft": True}, ["--batch_size", "1", "--lora_r", "2"], Mode(2), 1, 4, 162),
    ],
)
def test_a_trainings_options(monkeypatch, capsys, tmp_path, changes, options, mode, batch_size, processes, expected):
    """By hand, of a model whose parts are whole numbers of GiB."""
    seen = []

    def memory(model, mode, batch_size, encoder_parameters):
        seen.append((model["resolution"], mode, batch_size))
        return bench.Memory(40 * GIB, 40 * GIB, 80 * GIB, 40 * GIB, 5 * GIB, 7 * GIB, 2 * GIB)

    model = {**published("sd"), "source": "some/one"}
    model["inputs"] = model["inputs"] | {"sample": ["B", 4, "side", "side"]}
    monkeypatch.setattr(bench, "training_memory", memory)
    monkeypatch.setattr("trl_diffusion.cli.bench.published_models", lambda: {"one": model})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    main(["bench", "--estimate", "--config", str(tmp_path / "recipe.yaml"), *options])
    assert seen == [(512, mode, batch_size)]
    printed = capsys.readouterr().out
    assert f"512 pixels, {batch_size} image(s) in a micro-batch on each of {processes} GPUs" in printed
    size = float(re.search(r"recipe.yaml: (\S+) GiB on each GPU", printed)[1])
    assert size == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_name_or_path": "some/other"}, "'some/other', expected one of ['stable-diffusion-v1-5"),
        ({"accelerate_config": "zero3_offload"}, "accelerate_config='zero3_offload', expected one of"),
        ({"load_in_8bit": True}, "`load_in_8bit`, which the estimate does not know"),
        ({"resolution": ["512x768"]}, "resolution=['512x768'], expected one number"),
        ({"per_device_train_batch_size": "2"}, "per_device_train_batch_size='2'"),
        ({"num_processes": 0}, "num_processes=0"),
        ({"lora_rr": 3}, "'lora_rr' in"),
    ],
)
def test_options_that_the_estimate_does_not_know(refused, tmp_path, changes, words):
    source = {"model_name_or_path": published_models()["sd15"]["source"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | source | changes))
    assert words in refused("bench", "--estimate", "--config", tmp_path / "recipe.yaml")
