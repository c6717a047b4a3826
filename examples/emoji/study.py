"""Compares the four methods on the emoji, and tries the settings that the papers leave open.

    python examples/emoji/study.py tune --jobs 2
    python examples/emoji/study.py ablation --jobs 2
    python examples/emoji/study.py compare --jobs 2
    python examples/emoji/study.py curves --jobs 2
    python examples/emoji/study.py styles --jobs 2
    python examples/emoji/study.py draws

`tune` tries learning rates per method, `ablation` the settings of Diffusion-RPO; both train on the drawings and look
at the prompts with feedback only. `compare` trains every method with its own learning rate on two tasks and measures
on the held-out prompts too, `curves` shows a healthy run beside three ill ones and what the guards do, `styles` is
Style Alignment to the two target styles of styles.py, `draws` what `num_ref_draws` costs. The two tasks of `compare`:

- drawings: preferred are the drawings in the liked style (data configuration `preferences`);
- samples: preferred are those of the base model's own samples that are more colourful, a closed-form score.

All methods read the same pairs (KTO unpairs them, SFT takes the chosen images) and see equally many images. Each
training is a process of its own; its figures go to --work, from where an interrupted study goes on. The table is
written to docs/results, the plot to docs/images.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median, stdev

from common import HERE, LIKED
from datasets import Dataset, Features, Image, Value, concatenate_datasets, load_dataset
from tqdm import tqdm

from trl_diffusion.evaluation import win_rate


ROOT = HERE.parents[1]
TASKS = ("drawings", "samples")
STYLE_TARGETS = ("silhouette", "cyanotype")  # of styles.py
METHODS = ("sft", "dpo", "kto", "rpo")
SEEDS = (0, 1, 2)
IMAGES_PER_STEP = 32
SAMPLING_STEPS = 12
# Samples per prompt with feedback and per held-out prompt.
FEW, MANY = {"feedback": 1}, {"feedback": 1, "held_out": 4}

COMMON = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "max_steps": 40,
    "proportion_empty_prompts": 0.1,
    "activation_checkpointing": False,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
# A beta of 100 in KTO, which has no factor 1/2, is as strong as 200 in DPO and RPO.
METHOD = {
    "sft": {"per_device_train_batch_size": IMAGES_PER_STEP},
    "dpo": {"per_device_train_batch_size": IMAGES_PER_STEP // 2, "beta": 200.0},
    "kto": {"per_device_train_batch_size": IMAGES_PER_STEP, "beta": 100.0},
    "rpo": {"per_device_train_batch_size": IMAGES_PER_STEP // 2, "beta": 200.0, "embedding_model": str(HERE / "clip")},
}
LEARNING_RATES = (1e-4, 3e-4)
# Each row changes one thing of the first.
ABLATION: dict[str, dict] = {
    "temperature 0.1, text and image, outside, timestep per window": {},
    "temperature 0.02": {"temperature": 0.02},
    "temperature 0.5": {"temperature": 0.5},
    "embedding text": {"embedding": "text"},
    "embedding image": {"embedding": "image"},
    "weights inside": {"weight_placement": "inside"},
    "timestep per pair": {"timestep_sharing": "pair"},
}
# Fewer than of the comparison, after whose forty every method has reached the style of the drawings.
STYLE_STEPS = 20
# Of 16 images, on half of the prompts: each liked image is visited 32 times.
DRAWS_STEPS = 60
NUM_DRAWS = (1, 2, 4, None)
REWARDS = ("rewards/chosen", "rewards/rejected")
# Diffusion-DPO at the learning rate of the study, and what goes wrong.
CURVES = {
    "healthy": {"beta": 200.0, "learning_rate": 1e-4},
    "beta too small": {"beta": 0.1, "learning_rate": 1e-4},
    "beta too large": {"beta": 20000.0, "learning_rate": 1e-4},
    "learning rate too large": {"beta": 200.0, "learning_rate": 1e-3},
}
# The same illnesses with a guard.
GUARDS = {
    "learning rate too large, winner_guard=0.9": CURVES["learning rate too large"] | {"winner_guard": 0.9},
    "learning rate too large, stopped": CURVES["learning rate too large"]
    | {"error_growth_limit": 0.5, "error_growth_action": "stop"},
    "beta too small, winner_guard=0.9": CURVES["beta too small"] | {"winner_guard": 0.9},
}
PAIR = {"chosen": "tab:green", "rejected": "tab:red"}
# What a panel shows: metrics with their colours and labels.
PANELS: dict[str, dict[str, tuple[str, str]]] = {
    "loss": {"loss": ("black", "loss")},
    "margin": {"rewards/margins": ("black", "margin")},
    "error, policy / reference": {f"health/error_growth/{side}": (c, side) for side, c in PAIR.items()},
    "shares": {
        "health/gradient_factor": ("black", "gradient factor"),
        "health/negative_margins": ("tab:orange", "negative margins"),
    },
    "gradient to losers": {"health/rejected_gradient_scale": ("tab:purple", "scale of the losers' gradient")},
    "log-ratio by noise": {
        f"log_ratios/q{q}/{side}": (plain, f"q{q} {side}")
        for q, colours in ((1, ("limegreen", "salmon")), (4, ("darkgreen", "darkred")))
        for side, plain in zip(PAIR, colours, strict=True)
    },
    "rewards": {f"rewards/{side}": (c, side) for side, c in PAIR.items()},
    "reference point": {"kl": ("black", "reference point")},
}


@dataclass
class Run:
    """One training and its measurement."""

    task: str
    method: str
    seed: int = 0
    options: dict = field(default_factory=dict)
    samples: dict = field(default_factory=lambda: dict(MANY))

    @property
    def name(self) -> str:
        options = "".join(
            f"-{key}={value:g}" if isinstance(value, float) else f"-{key}={value}"
            for key, value in self.options.items()
        )
        return f"{self.task}-{self.method}{options}-{sum(self.samples.values())}-{self.seed}"


BASE = Run("drawings", "base")  # measured for all tasks at once


# ---- Data and measurement ----------------------------------------------------------------------------------------


def prompts_of(kind: str) -> list[str]:
    return load_dataset(str(HERE / "data"), "prompts", split=kind)["prompt"][:]


def pairs_of_samples(path: Path, per_prompt: int = 8) -> None:
    """The base's own samples of the prompts with feedback, best against worst: four pairs a prompt."""
    from diffusers import DiffusionPipeline
    from scoring import colourfulness, draw

    prompts = prompts_of("feedback")
    pipeline = DiffusionPipeline.from_pretrained(HERE / "base")
    rows = []
    for prompt, samples in zip(
        prompts, batches(draw(pipeline, prompts, per_prompt, "feedback", SAMPLING_STEPS), per_prompt), strict=True
    ):
        images = [sample.image for sample in samples]
        ranked = [images[i] for _, i in sorted(zip(colourfulness(images), range(per_prompt), strict=True))]
        rows += [{"prompt": prompt, "chosen": ranked[-1 - k], "rejected": ranked[k]} for k in range(per_prompt // 2)]
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Dataset.from_list(rows, features=features).to_parquet(temporary)
    temporary.replace(path)


def batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def training_data(task: str, work: Path) -> Dataset:
    if task == "drawings":
        return load_dataset(str(HERE / "data"), "preferences", split="train")
    return load_dataset("parquet", data_files=str(work / f"{task}.parquet"), split="train")


def prepare_style(target: str, work: Path) -> None:
    """The pairs of a target style, and plain samples of the held-out prompts."""
    from styles import style_pairs, write_held_out

    work.mkdir(parents=True, exist_ok=True)
    for path, write in (
        (work / f"{target}.parquet", lambda file: style_pairs(target, prompts_of("feedback")).to_parquet(file)),
        (work / "held_out.parquet", lambda file: write_held_out(file, prompts_of("held_out"), MANY["held_out"])),
    ):
        if not path.exists():
            write(path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)


def measure_style(target: str, held_out: list, work: Path) -> dict:
    """How near samples of the held-out prompts come to a target style."""
    from styles import StyleScores

    plain = load_dataset("parquet", data_files=str(work / "held_out.parquet"), split="train")
    scores = StyleScores(target, training_data(target, work), plain)
    return {
        "samples": scores([sample.image for sample in held_out]),
        # What the scores say of held-out pictures in the style (the distance: of one half to the other), and of plain
        # ones.
        "styled": {**scores(scores.styled), "frechet": scores.distance_of_halves()},
        "plain": scores(scores.plain),
    }


def measure(run: Run, pipeline, work: Path) -> dict:
    """Scores of the samples by kind of prompt; lists are in the order of prompts and seeds, the same for all runs."""
    from scoring import Judges, colourfulness, draw

    judges = Judges()
    everything = [prompt for kind in MANY for prompt in prompts_of(kind)]
    result = {}
    for kind, per_prompt in run.samples.items():
        # Other seeds than those of the feedback, which start at 0 for each prompt.
        samples = draw(pipeline, prompts_of(kind), per_prompt, f"{run.name}, {kind}", SAMPLING_STEPS, first=500)
        images = [sample.image for sample in samples]
        clip_score, own_prompt = judges.content(samples, everything)
        result[kind] = {
            "per_prompt": per_prompt,
            "style_share": judges.styles(images).count(LIKED) / len(images),
            "drawings": judges.liked(images),
            "samples": colourfulness(images),
            "clip_score": clip_score,
            "own_prompt": own_prompt,
        }
        if kind == "held_out" and run.task in STYLE_TARGETS:
            result["style"] = measure_style(run.task, samples, work)
            folder = work / run.name
            folder.mkdir(parents=True, exist_ok=True)
            for sample in samples[:: run.samples["held_out"]]:
                sample.image.save(folder / f"{sample.prompt.replace(' ', '-')}.png")
    return result


def train(run: Run, work: Path) -> None:
    """Trains (method `base`: does not), measures, and writes the figures."""
    import torch

    import trl_diffusion

    # Where a too large step has pushed the sigmoid to its flat end, gradients are denormal numbers, with which CPUs
    # compute ten times slower.
    torch.set_flush_denormal(True)
    if run.method == "base":
        from diffusers import DiffusionPipeline

        pipeline, figures = DiffusionPipeline.from_pretrained(HERE / "base"), {}
    else:
        name = f"Diffusion{run.method.upper()}"
        args = getattr(trl_diffusion, f"{name}Config")(
            str(work / run.name), seed=run.seed, **(COMMON | METHOD[run.method] | run.options)
        )
        trainer = getattr(trl_diffusion, f"{name}Trainer")(
            model=str(HERE / "base"), args=args, train_dataset=training_data(run.task, work)
        )
        start = time.perf_counter()
        trainer.train()
        figures = {
            "seconds": time.perf_counter() - start,
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        pipeline = trainer.pipeline
    figures = {"run": asdict(run), **figures, "measured": measure(run, pipeline, work)}
    temporary = work / f"{run.name}.tmp"
    temporary.write_text(json.dumps(figures))
    temporary.replace(work / f"{run.name}.json")


def run_all(runs: list[Run], work: Path, jobs: int) -> list[dict]:
    """Figures of all runs; those that are not there yet are made, `jobs` at a time."""
    work.mkdir(parents=True, exist_ok=True)
    if any(run.task == "samples" for run in runs) and not (work / "samples.parquet").exists():
        pairs_of_samples(work / "samples.parquet")
    for target in STYLE_TARGETS:
        if any(run.task == target for run in runs):
            prepare_style(target, work)
    todo = [run for run in runs if not (work / f"{run.name}.json").exists()]

    def start(run: Run) -> None:
        command = [sys.executable, __file__, "run", "--work", str(work), "--run", json.dumps(asdict(run))]
        with open(work / f"{run.name}.log", "w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            raise RuntimeError(f"{run.name} failed: see {work / run.name}.log")

    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(start, todo), total=len(todo), desc="Training", unit="run"))
    return [json.loads((work / f"{run.name}.json").read_text()) for run in runs]


# ---- The three studies -------------------------------------------------------------------------------------------


def score(figures: dict, task: str, kind: str) -> float:
    """Mean of the score that the task's preferences come from."""
    return mean(figures["measured"][kind][task])


def wins(figures: list[dict], base: dict, task: str, kind: str):
    """Median image of each prompt against the base's median image, over all seeds of the training."""
    ours, theirs = [], []
    for one in figures:
        measured, reference = one["measured"][kind], base["measured"][kind]
        for mine, other in zip(
            batches(measured[task], measured["per_prompt"]),
            batches(reference[task], measured["per_prompt"]),
            strict=True,
        ):
            ours.append(median(mine))
            theirs.append(median(other))
    return win_rate(ours, theirs)


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    """Mean and standard deviation over the seeds."""
    text = f"{scale * mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {scale * stdev(values):.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def tune(args: argparse.Namespace) -> None:
    runs = [
        Run("drawings", method, 100, {"learning_rate": rate}, {"feedback": 2})
        for method in METHODS
        for rate in LEARNING_RATES
    ]
    base, *found = run_all([BASE, *runs], args.work, args.jobs)
    rows, best = [], {}
    for one in found:
        run, kind = one["run"], one["measured"]["feedback"]
        rate = run["options"]["learning_rate"]
        content = kind["clip_score"] / base["measured"]["feedback"]["clip_score"]
        liked = score(one, "drawings", "feedback")
        rows.append([run["method"].upper(), f"{rate:g}", f"{liked:.3f}", f"{100 * content:.1f}"])
        # The highest score among those that keep the content: nine tenths of the base's CLIP score.
        if content >= 0.9:
            best[run["method"]] = max(best.get(run["method"], (-1.0, 0.0)), (liked, rate))
    write(args, "tune", table(["method", "learning rate", "P(liked)", "CLIP score, % of the base's"], rows))
    rates = {method: rate for method, (_, rate) in best.items()}
    (args.results / "learning_rates.json").write_text(json.dumps(rates, indent=2) + "\n")


def learning_rates(args: argparse.Namespace) -> dict[str, float]:
    return json.loads((args.results / "learning_rates.json").read_text())


def ablation(args: argparse.Namespace) -> None:
    base = run_all([BASE], args.work, 1)[0]
    # Few steps: after forty every setting has reached the liked style.
    rate = {"learning_rate": learning_rates(args)["rpo"], "max_steps": 15}
    runs = {
        name: [
            Run(
                "drawings", "rpo", seed, rate | {"temperature": 0.1, "timestep_sharing": "window"} | options, dict(FEW)
            )
            for seed in SEEDS
        ]
        for name, options in ABLATION.items()
    }
    # Diffusion-DPO at the same learning rate: what the contrast with other losers adds.
    runs["Diffusion-DPO"] = [Run("drawings", "dpo", seed, rate, dict(FEW)) for seed in SEEDS]
    found = iter(run_all([run for part in runs.values() for run in part], args.work, args.jobs))
    rows = []
    for name, part in runs.items():
        figures = [next(found) for _ in part]
        measured = [one["measured"]["feedback"] for one in figures]
        last = [one["log"][-1] for one in figures]
        w = wins(figures, base, "drawings", "feedback")
        rows.append(
            [
                name,
                spread([m["style_share"] for m in measured], 1, 100),
                spread([score(one, "drawings", "feedback") for one in figures], 3),
                f"{100 * w.rate:.0f} [{100 * w.low:.0f}, {100 * w.high:.0f}]",
                spread([m["clip_score"] for m in measured], 1),
                spread([entry.get("contrast/effective_losers", 1.0) for entry in last], 1),
                spread([entry.get("contrast/diagonal_weight", 1.0) for entry in last], 2),
            ]
        )
    head = [
        "setting",
        "liked style, %",
        "P(liked)",
        "win rate, %",
        "CLIP score",
        "losers per winner",
        "own loser's weight",
    ]
    write(args, "ablation", table(head, rows))


def compare(args: argparse.Namespace) -> None:
    rates = learning_rates(args)
    runs = {
        (task, method): [Run(task, method, seed, {"learning_rate": rates[method]}) for seed in SEEDS]
        for task in TASKS
        for method in METHODS
    }
    found = iter(run_all([BASE, *(run for part in runs.values() for run in part)], args.work, args.jobs))
    base = next(found)
    figures = {key: [next(found) for _ in part] for key, part in runs.items()}
    parts = []
    for task in TASKS:
        rows = []
        for method in ("base", *METHODS):
            group = [base] if method == "base" else figures[task, method]
            row = [method.upper() if method != "base" else "base"]
            row.append("" if method == "base" else f"{rates[method]:g}")
            for kind in MANY:
                measured = [one["measured"][kind] for one in group]
                row.append(spread([m["style_share"] for m in measured], 0, 100))
                if task == "samples":
                    row.append(spread([score(one, task, kind) for one in group], 1))
                row.append(spread([m["clip_score"] for m in measured], 1))
            w = wins(group, base, task, "held_out")
            row.append("" if method == "base" else f"{100 * w.rate:.0f} [{100 * w.low:.0f}, {100 * w.high:.0f}]")
            row.append("" if method == "base" else spread([one["seconds"] for one in group], 0))
            row.append("" if method == "base" else f"{max(one['peak_memory_gb'] for one in group):.1f}")
            rows.append(row)
        kinds = [f"liked style, {k} %" for k in ("feedback", "held-out")]
        head = ["method", "learning rate"]
        for kind, name in zip(kinds, ("feedback", "held-out"), strict=True):
            head += [kind, *([f"colourfulness, {name}"] if task == "samples" else []), f"CLIP score, {name}"]
        head += ["win rate, held-out %", "seconds", "peak memory, GB"]
        parts.append(f"### {task}\n\n{table(head, rows)}")
    write(args, "comparison", "\n\n".join(parts))
    plot(figures, base, args.images / "comparison.png")


def plot(figures: dict, base: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(METHODS, ("tab:gray", "tab:blue", "tab:green", "tab:red"), strict=True))
    titles = {"drawings": "style from drawings", "samples": "feedback on own samples"}
    labels = {"drawings": "P(liked style) by the judge", "samples": "colourfulness"}
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for row, task in zip(axes, TASKS, strict=True):
        for axis, kind in zip(row, MANY, strict=True):
            axis.plot(base["measured"][kind]["clip_score"], score(base, task, kind), "k*", markersize=13, label="base")
            for method in METHODS:
                group = figures[task, method]
                axis.plot(
                    [one["measured"][kind]["clip_score"] for one in group],
                    [score(one, task, kind) for one in group],
                    "o",
                    color=colours[method],
                    markersize=8,
                    alpha=0.8,
                    label=method.upper(),
                )
            axis.set(
                title=f"{titles[task]}: {'prompts with feedback' if kind == 'feedback' else 'held-out prompts'}",
                xlabel="CLIP score (is it still what the prompt says?)",
                ylabel=labels[task],
            )
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def styles(args: argparse.Namespace) -> None:
    """Style Alignment: every method, both target styles."""
    rates = learning_rates(args)
    samples = {"held_out": MANY["held_out"]}
    runs = {
        (target, method): [
            Run(target, method, seed, {"learning_rate": rates[method], "max_steps": STYLE_STEPS}, samples)
            for seed in SEEDS
        ]
        for target in STYLE_TARGETS
        for method in METHODS
    }
    bases = [Run(target, "base", samples=samples) for target in STYLE_TARGETS]
    # Seed by seed, so that what an interrupted study has is whole.
    order = [*bases, *(part[i] for i in range(len(SEEDS)) for part in runs.values())]
    found = dict(zip([run.name for run in order], run_all(order, args.work, args.jobs), strict=True))
    parts = []
    for target, base in zip(STYLE_TARGETS, bases, strict=True):
        rows = []
        groups = {"base": [found[base.name]]} | {
            method.upper(): [found[run.name] for run in runs[target, method]] for method in METHODS
        }
        style = found[base.name]["measured"]["style"]
        for name, kind in (("held-out pictures in the style", "styled"), ("the same, plain", "plain")):
            rows.append([name, *style_row([style[kind]]), ""])
        if target == "silhouette":  # one drawing of each prompt: two halves of them show different things
            rows[0][3] = ""
        for name, group in groups.items():
            measured = [one["measured"] for one in group]
            content = spread([m["held_out"]["clip_score"] for m in measured], 1)
            rows.append([name, *style_row([m["style"]["samples"] for m in measured]), content])
        head = ["", "in the style, judge %", "in the style, probe %", "Fréchet distance", "CLIP score of the content"]
        parts.append(f"### {target}\n\n{table(head, rows)}")
    write(args, "styles", "\n\n".join(parts))
    style_pictures({key: [found[run.name] for run in part] for key, part in runs.items()}, bases, args)


def style_row(figures: list[dict]) -> list[str]:
    return [
        spread([one["judge"] for one in figures], 0, 100),
        spread([one["probe"] for one in figures], 0, 100),
        spread([one["frechet"] for one in figures], 3),
    ]


def style_pictures(figures: dict, bases: list[Run], args: argparse.Namespace) -> None:
    """One sample of some held-out prompts, from the same seed: the base, and each method's first seed."""
    from PIL import Image as PILImage

    from trl_diffusion.callbacks import image_grid

    prompts, rows, captions = prompts_of("held_out")[:12], [], []
    for target, base in zip(STYLE_TARGETS, bases, strict=True):
        names = {"base": base.name} | {
            method.upper(): Run(**figures[target, method][0]["run"]).name for method in METHODS
        }
        for caption, name in names.items():
            rows.append([PILImage.open(args.work / name / f"{p.replace(' ', '-')}.png") for p in prompts])
            captions.append(f"{target}: {caption}")
    args.images.mkdir(parents=True, exist_ok=True)
    image_grid(rows, captions).save(args.images / "styles.png")


def curves(args: argparse.Namespace) -> None:
    """Each column a run: what its log shows, and how liked and how true to the prompt its samples are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def run_of(options: dict, method: str = "dpo") -> Run:
        return Run("drawings", method, 0, options | {"logging_steps": 1}, {"feedback": 2})

    everything = CURVES | GUARDS
    runs = [run_of(options) for options in everything.values()]
    base, kto, *found = run_all([BASE, run_of({"learning_rate": 3e-4}, "kto"), *runs], args.work, args.jobs)
    by_name = dict(zip(everything, found, strict=True))
    args.images.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, one in {**by_name, "Diffusion-KTO": kto}.items():
        measured, last = one["measured"]["feedback"], one["log"][-10:]
        content = 100 * measured["clip_score"] / base["measured"]["feedback"]["clip_score"]
        rows.append([name, str(len(one["log"])), f"{100 * measured['style_share']:.0f}", f"{content:.0f}"])
        for metric in ("health/error_growth/chosen", "health/error_growth/rejected", "health/gradient_factor"):
            rows[-1].append(f"{mean(entry[metric] for entry in last if metric in entry):.2f}")
    head = ["run", "steps", "liked style, %", "CLIP score, % of the base's"]
    head += [f"{name}, mean of the last ten steps" for name in ("winners' error growth", "losers'", "gradient factor")]
    write(args, "curves", table(head, rows))

    def draw(columns: dict[str, dict], panels: list[str], path: Path, width: float) -> None:
        size = (width * len(columns), 2.1 * len(panels) + 0.5)
        figure, axes = plt.subplots(
            len(panels), len(columns), figsize=size, sharex=True, layout="constrained", squeeze=False
        )
        for column, (title, one) in zip(axes.T, columns.items(), strict=True):
            column[0].set_title(title, fontsize=9)
            for axis, panel in zip(column, panels, strict=True):
                for metric, (colour, label) in PANELS[panel].items():
                    points = [(entry["step"], entry[metric]) for entry in one["log"] if metric in entry]
                    axis.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.2) if points else None
                axis.grid(alpha=0.3)
                if panel == "error, policy / reference":
                    axis.set_yscale("log")
                    axis.axhline(1, color="black", linewidth=0.6)
                    axis.set_ylim(0.5, 30)
                if panel in ("shares", "gradient to losers"):
                    axis.set_ylim(-0.05, 1.3)
            column[-1].set_xlabel("step")
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            axis.set_ylabel(panel, fontsize=9)
            if len(PANELS[panel]) > 1:
                axis.legend(fontsize=7)
        figure.savefig(path, dpi=75)
        plt.close(figure)

    ill = {name: by_name[name] for name in CURVES}
    draw(
        ill,
        ["loss", "margin", "error, policy / reference", "shares", "log-ratio by noise"],
        args.images / "curves_ill.png",
        3.2,
    )
    guarded = {"learning rate too large": by_name["learning rate too large"]} | {
        name: by_name[name] for name in GUARDS
    }
    draw(
        guarded, ["error, policy / reference", "gradient to losers", "margin"], args.images / "curves_guards.png", 3.2
    )
    draw(
        {"Diffusion-KTO": kto},
        ["loss", "rewards", "reference point", "error, policy / reference", "shares"],
        args.images / "curves_kto.png",
        6,
    )


def draws(args: argparse.Namespace) -> None:
    """Rewards with few draws of noise for each image: in training, on the same images with other noise, held out."""
    from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer

    data = load_dataset(str(HERE / "data"), "feedback", split="train")
    half = len(data) // 2  # 24 of the 48 prompts, with four images each
    parts = {"same": data.select(range(half)), "held": data.select(range(half, len(data)))}
    options = COMMON | METHOD["kto"] | {"learning_rate": 3e-4, "max_steps": DRAWS_STEPS}
    options |= {"per_device_train_batch_size": IMAGES_PER_STEP // 2, "per_device_eval_batch_size": 32}
    found: dict[int | None, list[dict[str, float]]] = {number: [] for number in NUM_DRAWS}
    args.work.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for number, seen in found.items():
            file = args.work / f"draws-{number}-{seed}.json"
            if not file.exists():
                config = DiffusionKTOConfig(str(args.work / "draws"), seed=seed, num_ref_draws=number, **options)
                trainer = DiffusionKTOTrainer(str(HERE / "base"), args=config, train_dataset=parts["same"])
                trainer.train()
                last = [entry for entry in trainer.state.log_history if "loss" in entry][-4:]
                rewards = {name: mean(entry[name] for entry in last) for name in REWARDS}
                for name, rows in parts.items():
                    # Behind itself the data set comes with other draws.
                    measured = trainer.evaluate(concatenate_datasets([rows] * 2), metric_key_prefix=name)
                    rewards |= {f"{name}_{metric}": measured[f"{name}_{metric}"] for metric in REWARDS}
                file.write_text(json.dumps(rewards))
            seen.append(json.loads(file.read_text()))
    columns = [f"{kind}{name}" for name in REWARDS for kind in ("", "same_", "held_")]
    rows = [
        [str(number or "all"), *(spread([one[name] for one in seen], 2) for name in columns)]
        for number, seen in found.items()
    ]
    kinds = ("in training", "same images, other noise", "held-out images")
    head = ["draws", *(f"{word} reward, {kind}" for word in ("liked", "disliked") for kind in kinds)]
    write(args, "draws", table(head, rows))


def write(args: argparse.Namespace, name: str, text: str) -> None:
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{name}.md").write_text(text + "\n")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study",
        choices=["tune", "ablation", "compare", "curves", "styles", "draws", "run"],
        help="`run` is for the study's own use",
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--work", type=Path, default=Path("outputs/study"), help="figures of the single trainings")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--run", type=json.loads, help="one run, as JSON")
    args = parser.parse_args()
    if args.study == "run":
        train(Run(**args.run), args.work)
    else:
        studies = (tune, ablation, compare, curves, styles, draws)
        {study.__name__: study for study in studies}[args.study](args)


if __name__ == "__main__":
    main()
