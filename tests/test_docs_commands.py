"""The commands of the docs run: as they are written, on small data and models under the names that they use."""

import io
import json
import shlex
import shutil
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset

from tests import tiny
from tests.conftest import pairs, picture, unpaired
from tests.test_readme import PAGES, command_lines
from trl_diffusion.cli import main


ROOT = Path(__file__).parents[1]
# What a CPU without a launcher needs, for one step; of an option that is given twice the last one counts.
SHORT = {
    **dict.fromkeys(
        ("kto", "rpo", "dpo", "sft"),
        "--accelerate_config single_gpu --num_processes 1 --use_cpu true --max_steps 1 "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --optim adamw_torch --report_to none "
        "--save_strategy no",
    ),
    "beta measure": "--num_rows 4 --num_steps 1 --per_device_train_batch_size 2 --use_cpu true",
    "bench": "--bench_steps 1 --bench_warmup 1 --per_device_train_batch_size 2 --use_cpu",
    "generate": "--num_inference_steps 1 --num_images_per_prompt 1",
    "evaluate": "--num_inference_steps 1 --num_images_per_prompt 1",
}


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "png")
    return buffer.getvalue()


# ---- What the commands name -----------------------------------------------------------------------------------------


def images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(10 * len(folder.name) + i))  # others in another folder
        (folder / f"{i}.txt").write_text(f"picture {i}")


def splits(data: Callable[[], Dataset]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            data().to_parquet(folder / f"{split}.parquet")

    return build


def pickapic() -> Dataset:
    rows = [
        {"caption": f"picture {i}", "jpg_0": png(2 * i), "jpg_1": png(2 * i + 1), "label_0": float(i % 2)}
        | {"label_1": float(1 - i % 2), "image_0_uid": f"{2 * i}", "image_1_uid": f"{2 * i + 1}"}
        for i in range(6)
    ]
    return Dataset.from_list(rows)


def ratings() -> Dataset:
    data = unpaired(10).remove_columns("label")
    return data.add_column("score", [float(i) for i in range(10)])


def kto_csv(file: Path) -> None:
    lines = ["file_name,caption,split"]
    lines += [f"{i}.png,picture {i},{label}" for i, label in enumerate(2 * ["exclusive_win", "exclusive_lose"])]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def hpdv2(file: Path) -> None:
    rows = [
        {"prompt": f"picture {i}", "image_path": ["0.png", "1.png"], "human_preference": [i % 2, 1 - i % 2]}
        for i in range(2)
    ]
    file.write_text(json.dumps(rows))


def shard(file: Path) -> None:
    with tarfile.open(file, "w") as tar:
        for i in range(4):
            parts = {"jpg": png(i), "txt": b"a picture", "json": json.dumps({"liked": i % 2 == 0}).encode()}
            for ending, content in parts.items():
                member = tarfile.TarInfo(f"{file.stem}-{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def lora(folder: Path) -> None:
    """Of the model and data that the same page names, or would."""
    for name in ("models/sdxl", "data/pickapic-pairs"):
        BUILDERS[name](Path(name))
    options = f"--model_name_or_path models/sdxl --dataset_name data/pickapic-pairs --output_dir {folder} --use_peft"
    main(["dpo", *options.split(), *SHORT["dpo"].split()])


def saved(pipeline: Callable) -> Callable[[Path], None]:
    return lambda folder: pipeline().save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], object]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": saved(tiny.tiny_stable_diffusion),
    "stabilityai/stable-diffusion-xl-base-1.0": saved(tiny.tiny_stable_diffusion_xl),
    "models/sdxl": saved(tiny.tiny_stable_diffusion_xl),
    "outputs/run": lora,
    "outputs/sd15-dpo": saved(tiny.tiny_stable_diffusion),
    "outputs/emoji-kto": lambda folder: shutil.copytree(ROOT / "examples/emoji/base", folder),
    "openai/clip-vit-large-patch14": tiny.tiny_clip,
    "data/pickapic-pairs": splits(pairs),
    "data/pickapic-liked": splits(unpaired),
    "data/pickapic": splits(unpaired),
    "data/mine": splits(unpaired),
    "my/preferences": splits(pairs),
    "my/ratings": splits(ratings),
    "yuvalkirstain/pickapic_v2": splits(pickapic),
    "liked": images,
    "disliked": images,
    "pickapic": images,
    "train": images,
    "train.json": hpdv2,
    "train_processed_v3.csv": kto_csv,
    "pickapic/train_processed_v3.csv": kto_csv,
    "train-0000.tar": shard,
    "train-0001.tar": shard,
    "prompts.txt": lambda file: file.write_text("red apple\nrocket\n"),
    "kto.yaml": lambda file: shutil.copy(ROOT / "examples/emoji/kto.yaml", file),
}


# ---- The commands ---------------------------------------------------------------------------------------------------


def runs_here(words: list[str]) -> bool:
    """Several machines, other programs and a pair of processes that is timed are beyond a test of the docs."""
    return words[:1] == ["trl-diffusion"] and not {"--num_machines", "--against"} & set(words)


COMMANDS = {page: [words for words in command_lines(page) if runs_here(words)] for page in PAGES[1:]}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, found in COMMANDS.items() if found], ids=lambda page: page.stem)
def test_commands_run(page, tmp_path, monkeypatch):
    """To the first step, at least; one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    there = set()
    for words in COMMANDS[page]:
        used = [word for option, word in pairwise(words) if option != "--output_dir"]
        for name in ("openai/clip-vit-large-patch14", *used):
            if name in BUILDERS and name not in there:
                BUILDERS[name](tmp_path / name)
                there.add(name)
        command = " ".join(words[1:3]) if words[1] in ("beta", "data") or "--estimate" in words else words[1]
        written = words[words.index("--output_dir") + 1] if "--output_dir" in words else None
        main([*words[1:], *shlex.split(SHORT.get(command, ""))])
        if written is not None:
            assert any((tmp_path / written).iterdir())
            there.add(written)
