"""Train the base text-to-image model of the example: first the VAE, then text encoder and UNet.

    torchrun --nproc-per-node 2 examples/emoji/train_base.py --node-modules node_modules

The model learns the prompts of common.PROMPTS in all four styles; no caption names a style, so that what it draws is
a mixture of styles. Both stages write checkpoints to --work and go on from them when started again. The finished
pipeline (StableDiffusionPipeline, half precision on disk) is written to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import HERE, LIKED, PROMPTS, STYLES, Concept, is_test_name, load_drawings, multiply_in_bfloat16, to_tensor
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizer import build_tokenizer
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """One flat all-reduce: cheaper than DDP for models this small."""
    if WORLD == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= WORLD
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


class Ema:
    def __init__(self, modules: nn.ModuleDict, decay: float) -> None:
        self.modules, self.decay = copy.deepcopy(modules).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, modules: nn.ModuleDict, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.modules.parameters()), list(modules.parameters()), weight)


class Loop:
    """What both stages share: optimizer, EMA, learning rate, checkpoints that a restart goes on from."""

    def __init__(self, modules: nn.ModuleDict, lr: float, steps: int, ema: float, checkpoint: Path, seed: int) -> None:
        self.modules, self.lr, self.steps, self.seed, self.checkpoint = modules, lr, steps, seed, checkpoint
        self.parameters = list(modules.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01)
        self.ema = Ema(modules, ema)
        self.start = 0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            modules.load_state_dict(state["modules"])
            self.ema.modules.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.start = state["step"]

    def __iter__(self):
        options = {"total": self.steps, "initial": self.start, "disable": RANK > 0, "mininterval": 5}
        steps = tqdm(range(self.start, self.steps), self.checkpoint.stem, **options)
        for step in steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (step + 1) / 50) * max(0.02, 1 - step / self.steps)
            # seeded by step and rank, so that a resumed run draws what the uninterrupted one would have drawn
            self.generator = torch.Generator().manual_seed(self.seed + 2 * (step * WORLD + RANK))
            self.bar = steps
            yield step

    def update(self, loss: torch.Tensor, step: int) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.update(self.modules, step)

    def save(self, step: int) -> None:
        if RANK == 0:
            state = {"modules": self.modules.state_dict(), "ema": self.ema.modules.state_dict(), "step": step}
            temporary = self.checkpoint.with_suffix(".tmp")
            torch.save(state | {"optimizer": self.optimizer.state_dict()}, temporary)
            temporary.replace(self.checkpoint)  # a stop while writing leaves the old checkpoint


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def gradient_l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(a.diff(dim=-1), b.diff(dim=-1)) + F.l1_loss(a.diff(dim=-2), b.diff(dim=-2))


def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    with torch.no_grad():
        errors = [((vae(x).sample.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)) for x in images.split(64)]
    return (-10 * torch.cat(errors).log10()).mean().item()


def train_vae(args: argparse.Namespace, concepts: list[Concept], images: torch.Tensor) -> AutoencoderKL:
    """`images`: (concepts, styles, 3, 64, 64) in -1..1. Learns from nine names in ten and all prompts."""
    prompt_rows = [i for i, c in enumerate(concepts) if c.name in PROMPTS]
    test_rows = [i for i, c in enumerate(concepts) if c.name not in PROMPTS and is_test_name(c.name)]
    other_rows = sorted(set(range(len(concepts))) - set(prompt_rows) - set(test_rows))
    prompts, test, others = (images[rows].flatten(0, 1) for rows in (prompt_rows, test_rows, other_rows))
    vae = build_vae()
    loop = Loop(nn.ModuleDict({"vae": vae}), args.vae_lr, args.vae_steps, 0.995, args.work / "vae.pt", seed=0)
    for step in loop:
        g = loop.generator
        cropped = step < 0.6 * args.vae_steps  # crops cost a quarter, so four times as many fit into a step
        n = args.vae_batch * (4 if cropped else 1)
        pool = [prompts[torch.randint(len(prompts), (n // 4,), generator=g)]]
        pool.append(others[torch.randint(len(others), (n - n // 4,), generator=g)])
        x = torch.cat(pool)
        if cropped:
            top, left = torch.randint(0, 33, (2,), generator=g).tolist()
            half = n // 2  # two crop positions a step
            one, two = slice(top, top + 32), slice(left, left + 32)
            x = torch.cat([x[:half, :, one, two], x[half:, :, two, one]])
        if torch.rand((), generator=g) < 0.5:
            x = x.flip(-1)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator=g)).sample
        # KL of 2e-3 per latent number: with ten times less the posterior has no noise, and the decoder is brittle
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * gradient_l1(y, x) + 2e-3 * kl
        loop.update(loss, step)
        if (step + 1) % args.save_every == 0 or step + 1 == args.vae_steps:
            loop.save(step + 1)
            if RANK == 0:
                ema = loop.ema.modules["vae"].eval()
                text = f"step {step + 1}: loss {loss.item():.4f}, KL {kl.item():.2f}, posterior std"
                text += f" {posterior.std.mean().item():.3f}, PSNR of unseen drawings {psnr(ema, test[::5]):.2f} dB"
                loop.bar.write(text)
    vae = loop.ema.modules["vae"].eval()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=round(1 / vae.encode(prompts).latent_dist.sample().std().item(), 4))
    if RANK == 0:
        figures = {"psnr_unseen": psnr(vae, test), "psnr_prompts": psnr(vae, prompts)}
        print(figures | {"scaling_factor": vae.config.scaling_factor}, flush=True)
    return vae


def build_denoiser(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers reads this as the number of heads
    )
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(text_config)})


def captions(concepts: list[Concept], rows: torch.Tensor, generator: torch.Generator) -> list[str]:
    """The label; in three of ten cases with some tags behind it; in one of ten nothing (for guidance)."""
    texts = []
    for row, kind in zip(rows.tolist(), torch.rand(len(rows), generator=generator).tolist(), strict=True):
        concept = concepts[row]
        text = "" if kind < 0.1 else concept.label
        if kind > 0.7 and concept.tags:
            order = torch.randperm(len(concept.tags), generator=generator).tolist()
            text += ", " + ", ".join(concept.tags[i] for i in order[:3])
        texts.append(text)
    return texts


def save_pipeline(modules: nn.ModuleDict, vae: AutoencoderKL, tokenizer: CLIPTokenizer, out: Path) -> None:
    parts = {name: copy.deepcopy(module).half() for name, module in {**modules, "vae": vae}.items()}
    scheduler = DDIMScheduler(**SCHEDULE)
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(out)
    # stored in half precision, used in full: transformers would otherwise load the text encoder in half precision
    path = out / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def train_denoiser(
    args: argparse.Namespace, concepts: list[Concept], images: torch.Tensor, vae: AutoencoderKL
) -> None:
    tokenizer = build_tokenizer(concepts)
    rows = [i for i, c in enumerate(concepts) if c.name in PROMPTS]
    concepts, images = [concepts[i] for i in rows], images[rows]
    with torch.no_grad():
        posterior = vae.encode(images.flatten(0, 1)).latent_dist
    shape = (len(rows), len(STYLES), *posterior.mean.shape[1:])
    mean, std = (t.view(shape) * vae.config.scaling_factor for t in (posterior.mean, posterior.std))
    modules = build_denoiser(tokenizer)
    if RANK == 0:
        print({name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}, flush=True)
    loop = Loop(modules, args.lr, args.steps, args.ema, args.work / "denoiser.pt", seed=1)
    if args.bfloat16:  # after the loop has made its EMA copy, which stays in full precision
        multiply_in_bfloat16(modules["unet"])
    others = (1 - args.liked_share) / (len(STYLES) - 1)
    share = torch.tensor([args.liked_share if s == LIKED else others for s in STYLES])
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = ((snr.clamp(max=5) + 1) / snr).clamp(max=20)
    total, started = 0.0, time.time()
    n = args.batch_size // WORLD
    for step in loop:
        g = loop.generator
        prompt = torch.randint(len(rows), (n,), generator=g)
        style = torch.multinomial(share, n, replacement=True, generator=g)
        # the posterior keeps its noise: it blurs the 256 training points a little
        clean = mean[prompt, style]
        clean = clean + std[prompt, style] * torch.randn(clean.shape, generator=g)
        noise = torch.randn(clean.shape, generator=g)
        t = torch.randint(len(alphas), (n,), generator=g)
        a = alphas[t].view(-1, 1, 1, 1)
        tokens = tokenizer(captions(concepts, prompt, g), padding="max_length", truncation=True, return_tensors="pt")
        embeds = modules["text_encoder"](tokens.input_ids)[0]
        predicted = modules["unet"](a.sqrt() * clean + (1 - a).sqrt() * noise, t, embeds).sample
        loss = ((predicted - noise).square().mean((1, 2, 3)) * weights[t]).mean()
        loop.update(loss, step)
        total = loss.item() if step == loop.start else 0.99 * total + 0.01 * loss.item()
        if RANK == 0 and (step + 1) % 20 == 0:
            loop.bar.set_postfix(loss=f"{total:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            loop.save(step + 1)
            if RANK == 0:
                save_pipeline(loop.ema.modules, vae, tokenizer, args.out)
                rate = (step + 1 - loop.start) * args.batch_size / (time.time() - started)
                seen = (step + 1) * args.batch_size
                loop.bar.write(f"step {step + 1}: {seen} pictures seen, {rate:.0f} a second, loss {total:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-modules", type=Path, default=Path("node_modules"))
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--work", type=Path, default=Path("outputs/emoji-work"), help="folder of the checkpoints")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--vae-batch", type=int, default=4, help="whole pictures a step and process")
    parser.add_argument("--vae-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=2600, help="steps of text encoder and UNet")
    parser.add_argument("--batch-size", type=int, default=32, help="over all processes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--liked-share", type=float, default=0.18, help="of the training data")
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16 (UNet only)")
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)  # the same start on every process
    if WORLD > 1:
        dist.init_process_group("gloo")
    args.work.mkdir(parents=True, exist_ok=True)
    concepts, drawings = load_drawings(args.node_modules)
    images = to_tensor(drawings)
    vae = train_vae(args, concepts, images)
    train_denoiser(args, concepts, images, vae)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
