"""Train the two small judges of the example: a CLIP model for the content and a classifier for the style.

    python examples/emoji/train_clip.py --node-modules node_modules

- clip/: CLIPModel and CLIPProcessor, trained on the drawings of every name in all four styles; three in four
  pictures of a batch are prompts of the example. It is meant for these prompts.
- judge/: CLIPForImageClassification with the four styles as classes, trained without the example's prompts and
  without the test names, so that its accuracy is measured on things that it never saw.

Both also see the drawings as the base model's VAE gives them back, since samples of the base are softer than drawings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from common import HERE, LIKED, PROMPTS, STYLES, Concept, is_test_name, load_drawings, multiply_in_bfloat16, to_tensor
from diffusers import AutoencoderKL
from tokenizer import build_tokenizer
from torch import nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPForImageClassification, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip import CLIPImageProcessorPil


TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 3}
# black silhouettes have no colour to be known by, so they are shown more often
STYLE_SHARE = torch.tensor([0.4 if style == LIKED else 0.2 for style in STYLES])
VISION = TOWER | {"image_size": 64, "patch_size": 8}


def augment(x: torch.Tensor, g: torch.Generator, content: bool) -> torch.Tensor:
    """Turn, scale, shift, soften, add noise. For the content also mix the colour channels or drop colour; for the
    style also mirror. One picture in five stays as it is."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(len(x)).uniform_(low, high, generator=g)

    original, keep = x, (uniform(0, 1) < 0.2).view(-1, 1, 1, 1)
    angle, scale = uniform(-0.25, 0.25), uniform(0.85, 1.2)
    mirror = torch.where(uniform(0, 1) < (0.0 if content else 0.5), -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos * mirror, -sin, uniform(-0.12, 0.12)], 1)]
    rows.append(torch.stack([sin * mirror, cos, uniform(-0.12, 0.12)], 1))
    where = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, where, align_corners=False) + 1  # what comes in from outside is white
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, uniform(-0.5, 1.0).clamp(min=0).view(-1, 1, 1, 1))
    if content:
        mix = torch.rand(len(x), 3, 3, generator=g).softmax(-1)
        grey = torch.full((3, 3), 1 / 3).expand_as(mix)
        mix = torch.where((uniform(0, 1) < 0.4).view(-1, 1, 1), grey, mix)
        mix = torch.lerp(torch.eye(3).expand_as(mix), mix, (uniform(-1.0, 1.0).clamp(min=0) ** 0.5).view(-1, 1, 1))
        x = torch.einsum("bij,bjhw->bihw", mix, x)
        x = 1 - (1 - x) * uniform(0.6, 1.0).view(-1, 1, 1, 1)  # paler
    x = x + torch.randn(x.shape, generator=g) * uniform(-0.05, 0.1).clamp(min=0).view(-1, 1, 1, 1)
    return torch.where(keep, original, x.clamp(-1, 1))


@torch.no_grad()
def through_vae(vae: AutoencoderKL, images: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Encoded and decoded, with a little noise on the latents: like samples of a base that is not quite exact."""
    out = []
    for x in images.flatten(0, 1).split(64):
        latents = vae.encode(x).latent_dist.sample(generator=g)
        spread = torch.empty(len(x), 1, 1, 1).uniform_(0, 0.25, generator=g) * latents.std()
        out.append(vae.decode(latents + spread * torch.randn(latents.shape, generator=g)).sample.clamp(-1, 1))
    return torch.cat(out).view_as(images)


def rates(steps: int, lr: float, optimizer: torch.optim.Optimizer, name: str):
    bar = tqdm(range(steps), name, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * max(0.01, 1 - step / steps)
        yield step, bar


def labels_with_tags(concepts: list[Concept], rows: list[int], g: torch.Generator) -> list[str]:
    texts = []
    for row in rows:
        text, tags = concepts[row].label, concepts[row].tags
        if tags and torch.rand((), generator=g) < 0.2:
            text += ", " + tags[int(torch.randint(len(tags), (), generator=g))]
        texts.append(text)
    return texts


def retrieval(model: CLIPModel, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """For (prompts, ...) pictures: is the text of the same row the nearest one?"""
    model.eval()
    with torch.no_grad():
        texts = F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
        flat = images.flatten(0, images.dim() - 4)
        features = F.normalize(model.get_image_features(pixel_values=flat).pooler_output, dim=-1)
    model.train()
    best = (features @ texts.T).argmax(-1).view(images.shape[:-3])
    return best == torch.arange(len(images)).view(-1, *[1] * (best.dim() - 1))


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_clip(args: argparse.Namespace, concepts: list[Concept], sources: list[torch.Tensor]) -> None:
    tokenizer = build_tokenizer(concepts)
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length} | special
    text["num_hidden_layers"] = 2
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=128))
    if args.bfloat16:
        multiply_in_bfloat16(model)
    prompts = [i for i, c in enumerate(concepts) if c.name in PROMPTS]
    others = [i for i, c in enumerate(concepts) if c.name not in PROMPTS]
    prompt_ids = encode(tokenizer, [concepts[i].label for i in prompts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    g = torch.Generator().manual_seed(1)
    for step, bar in rates(args.clip_steps, args.lr, optimizer, "clip"):
        # the texts: all prompts and some other names; the pictures: three in four are prompts, two styles of each
        extra = torch.randperm(len(others), generator=g)[: args.batch_size // 4].tolist()
        texts = prompts + [others[i] for i in extra]
        pick = torch.randperm(len(prompts), generator=g)[: args.batch_size - len(extra)]
        target = torch.cat([pick, torch.arange(len(prompts), len(texts))])
        rows, x = [texts[i] for i in target.tolist()], []
        for _ in range(2):
            style = torch.multinomial(STYLE_SHARE, len(rows), replacement=True, generator=g)
            source = torch.randint(len(sources), (len(rows),), generator=g).tolist()
            x.append(torch.stack([sources[k][i, s] for k, i, s in zip(source, rows, style, strict=True)]))
        output = model(
            input_ids=encode(tokenizer, labels_with_tags(concepts, texts, g)),
            pixel_values=augment(torch.cat(x), g, content=True),
        )
        # each picture against all texts, and each text that has a picture against the pictures of one half
        both = output.logits_per_image.view(2, len(rows), len(texts))
        own = torch.arange(len(rows))
        loss = sum((F.cross_entropy(p, target) + F.cross_entropy(p.T[target], own) for p in both), torch.zeros(())) / 4
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6)
        if (step + 1) % 200 == 0 or step + 1 == args.clip_steps:
            fresh = torch.Generator().manual_seed(2)
            views = augment(sources[0][prompts].flatten(0, 1), fresh, content=True)
            right = retrieval(model, prompt_ids, views.view(len(prompts), len(STYLES), 3, 64, 64)).float().mean(0)
            shown = ", ".join(f"{s} {v:.3f}" for s, v in zip(STYLES, right.tolist(), strict=True))
            bar.write(f"step {step + 1}: loss {loss.item():.3f}; top-1 of {len(prompts)}, new augmentation: {shown}")
    for name, images in zip(("drawings", "through the VAE"), sources, strict=True):
        right = retrieval(model, prompt_ids, images[prompts]).float().mean(0)
        shown = ", ".join(f"{s} {v:.3f}" for s, v in zip(STYLES, right.tolist(), strict=True))
        print(f"top-1 of {len(prompts)}, {name}: {shown}")
    save(model, args.out / "clip")
    CLIPProcessor(image_processor(), tokenizer).save_pretrained(args.out / "clip")


def train_judge(args: argparse.Namespace, concepts: list[Concept], sources: list[torch.Tensor]) -> None:
    labels = dict(enumerate(STYLES))
    config = CLIPConfig(
        text_config={"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},  # not used
        vision_config=VISION,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )
    model = CLIPForImageClassification(config)
    if args.bfloat16:
        multiply_in_bfloat16(model)
    unseen = {i for i, c in enumerate(concepts) if c.name in PROMPTS or is_test_name(c.name)}
    train = torch.tensor([i for i in range(len(concepts)) if i not in unseen])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    g = torch.Generator().manual_seed(3)

    def measure(rows: list[int]) -> str:
        model.eval()
        texts = []
        truth = torch.arange(len(STYLES)).repeat(len(rows))
        liked = list(STYLES).index(LIKED)
        fresh = torch.Generator().manual_seed(4)
        views = {name: s[rows].flatten(0, 1) for name, s in zip(("drawings", "through VAE"), sources, strict=True)}
        views["augmented"] = augment(views["drawings"], fresh, content=False)
        for name, x in views.items():
            with torch.no_grad():
                guess = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in x.split(128)])
            two = ((guess == liked) == (truth == liked)).float().mean()
            texts.append(f"{name}: liked against rest {two:.4f}, four styles {(guess == truth).float().mean():.3f}")
        model.train()
        return f"{4 * len(rows)} pictures; " + "; ".join(texts)

    for step, bar in rates(args.judge_steps, args.lr, optimizer, "judge"):
        rows = train[torch.randint(len(train), (args.batch_size,), generator=g)]
        style = torch.randint(len(STYLES), rows.shape, generator=g)
        source = torch.randint(len(sources), rows.shape, generator=g).tolist()
        x = torch.stack([sources[k][i, s] for k, i, s in zip(source, rows, style, strict=True)])
        logits = model(pixel_values=augment(x, g, content=False)).logits
        loss = F.cross_entropy(logits, style, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            bar.write(f"step {step + 1}: loss {loss.item():.3f}; never seen: {measure(sorted(unseen))}")
    prompts = [i for i, c in enumerate(concepts) if c.name in PROMPTS]
    print("judge, the example's prompts (never seen):", measure(prompts))
    print("judge, test names and prompts (never seen):", measure(sorted(unseen)))
    save(model, args.out / "judge")
    image_processor().save_pretrained(args.out / "judge")


def image_processor() -> CLIPImageProcessorPil:
    half = [0.5, 0.5, 0.5]
    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    return CLIPImageProcessorPil(**sizes, image_mean=half, image_std=half)


def save(model: nn.Module, folder: Path) -> None:
    """Half precision on disk, full precision when loaded."""
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-modules", type=Path, default=Path("node_modules"))
    parser.add_argument("--out", type=Path, default=HERE, help="clip/ and judge/ are written there")
    parser.add_argument("--vae", type=Path, default=HERE / "base/vae")
    parser.add_argument("--only", choices=["clip", "judge"])
    parser.add_argument("--clip-steps", type=int, default=1200)
    parser.add_argument("--judge-steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=48, help="names a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16 while training")
    args = parser.parse_args()
    concepts, drawings = load_drawings(args.node_modules)
    images = to_tensor(drawings)
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    sources = [images, through_vae(vae, images, torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    if args.only != "judge":
        train_clip(args, concepts, sources)
    if args.only != "clip":
        train_judge(args, concepts, sources)


if __name__ == "__main__":
    main()
