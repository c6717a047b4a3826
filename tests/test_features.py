"""Features and reference errors computed once: the same training, nothing frozen run again, nothing stale used."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from tests.conftest import embed, pairs, picture, unpaired
from tests.test_families import BUILD, RESOLUTION
from tests.test_methods import ALL, BOTH, assert_equal, logged, losses, trained, trainer_of, weights
from tests.tiny import tiny_stable_diffusion
from trl_diffusion import unpair_preference_dataset
from trl_diffusion.data import embed_pairs, features, from_folders, from_kto_csv, select_preferred
from trl_diffusion.data.cache import data_fingerprint
from trl_diffusion.data.draws import ExampleKey


@ALL
@BOTH
@pytest.mark.parametrize("flip", [False, True], ids=["", "flip"])
def test_training_with_features_is_the_same(tmp_path, method, peft_config, flip):
    # AdamW would make large steps of rounding errors, and a large beta a large loss.
    options = {"peft_config": peft_config, "random_flip": flip, "optim": "sgd", "learning_rate": 1e-2, "max_steps": 6}
    if method != "sft":
        options["beta"] = 1.0
    live = trained(method, tmp_path / "live", **options)
    cached = trained(method, tmp_path / "cached", cache_features=True, **options)
    for name in ("loss", "errors/chosen", "ref_errors/chosen"):
        assert logged(cached, name) == pytest.approx(logged(live, name), abs=1e-6)


@BOTH
@pytest.mark.parametrize("method", ["kto", "rpo", "dpo"])
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_precomputed_reference_errors_are_the_live_ones(tmp_path, method, peft_config, cached):
    options = {"num_ref_draws": 2, "cache_features": cached, "max_steps": 8, "peft_config": peft_config}
    live = trained(method, tmp_path / "live", **options)
    computed = trained(method, tmp_path / "computed", precompute_ref_log_probs=True, **options)
    assert computed.reference is None
    assert losses(computed) == losses(live)
    assert_equal(weights(computed), weights(live))


# ---- Every family, every way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILD)
def test_features_of_every_family(tmp_path, name):
    """Prompts of different lengths among them, which some families pad to the longest of a batch."""
    data = (
        pairs(6).remove_columns("prompt").add_column("prompt", ["a", "a red dog", "", "a", "b c d e f g", "picture"])
    )
    # What a model draws with its own timestep sampling and weights, no training needed.
    options = {"resolution": RESOLUTION[name], "max_steps": 3, "beta": 1.0, "learning_rate": 0.0, "optim": "sgd"}
    live = trained("dpo", tmp_path / "live", data, pipeline=BUILD[name](), **options)
    cached = trained("dpo", tmp_path / "cached", data, pipeline=BUILD[name](), cache_features=True, **options)
    for metric in ("errors/chosen", "errors/rejected"):
        assert logged(cached, metric) == pytest.approx(logged(live, metric), abs=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"window": "step", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"dataloader_num_workers": 2},
        {"bf16": True},
        {"reference_point": "mismatched"},
        {"features_dtype": "float32"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_features_with_other_options(tmp_path, options):
    options = {"optim": "sgd", "learning_rate": 1e-2, "beta": 1.0, "eval_dataset": unpaired(5)} | options
    live, cached = (
        trained("kto", tmp_path / str(cached), cache_features=cached, **copy.deepcopy(options | extra))
        for cached, extra in ((False, {"features_dtype": None}), (True, {}))
    )
    # With bfloat16 the two agree as far as a batch of another size agrees.
    tolerance = 1e-6 if "bf16" not in options else 1e-3
    assert logged(cached, "errors/chosen") == pytest.approx(logged(live, "errors/chosen"), abs=tolerance)
    live, cached = live.evaluate(), cached.evaluate()
    for metric in ("eval_loss", "eval_errors/chosen", "eval_rewards/accuracies"):
        assert cached[metric] == pytest.approx(live[metric], abs=tolerance)


def in_two_buckets(rows: int = 12) -> datasets.Dataset:
    """Pairs of which every third is upright."""
    sizes = [(16, 24) if i % 3 == 0 else (24, 16) for i in range(rows)]
    columns = {
        "prompt": [f"picture {i % 5}" for i in range(rows)],
        "chosen": [picture(i, size) for i, size in enumerate(sizes)],
        "rejected": [picture(100 + i, size) for i, size in enumerate(sizes)],
    }
    return datasets.Dataset.from_dict(columns, features=pairs(1).features)


@BOTH
def test_buckets_with_everything_computed_once(tmp_path, peft_config):
    """Features to rounding, and the reference's errors to the last bit."""
    options = {"resolution": ["16x24", "24x16"], "num_ref_draws": 2, "max_steps": 8, "peft_config": peft_config}
    options |= {"optim": "sgd", "learning_rate": 1e-2, "beta": 1.0, "eval_dataset": in_two_buckets(5)}
    live = trained("dpo", tmp_path / "live", in_two_buckets(), **options)
    cached = trained("dpo", tmp_path / "cached", in_two_buckets(), cache_features=True, **options)
    computed = trained(
        "dpo", tmp_path / "all", in_two_buckets(), cache_features=True, precompute_ref_log_probs=True, **options
    )
    assert logged(cached, "errors/chosen") == pytest.approx(logged(live, "errors/chosen"), abs=1e-6)
    assert losses(computed) == losses(cached)
    assert_equal(weights(computed), weights(cached))
    one, two, three = (trainer.evaluate() for trainer in (live, cached, computed))
    for name in ("eval_loss", "eval_ref_errors/chosen"):
        assert one[name] == pytest.approx(two[name], abs=1e-6) == pytest.approx(three[name], abs=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_features_in_half_precision(tmp_path, dtype):
    """About as exact as their dtype, half as large, and the denoiser is given the same dtypes as without."""
    full = trained("dpo", tmp_path, cache_features=True, max_steps=2)
    half = trained("dpo", tmp_path, cache_features=True, features_dtype=dtype, max_steps=2)
    assert logged(half, "errors/chosen") == pytest.approx(logged(full, "errors/chosen"), rel=2e-2)
    assert logged(half, "errors/chosen") != logged(full, "errors/chosen")
    sizes = [sum(len(blob) for blob in trainer.train_dataset["latents"]) for trainer in (full, half)]
    assert sizes[1] < 0.7 * sizes[0]


def test_resume_with_everything_computed_once(tmp_path):
    options = {"cache_features": True, "precompute_ref_log_probs": True, "random_flip": True, "max_steps": 6}
    straight = trained("rpo", tmp_path / "straight", **options)
    trained("rpo", tmp_path / "resumed", save_strategy="steps", save_steps=4, **options)
    resumed = trained(
        "rpo", tmp_path / "resumed", resume=str(tmp_path / "resumed" / "checkpoint-4"), save_strategy="no", **options
    )
    assert_equal(weights(resumed), weights(straight))


def test_draws_repeat_with_num_ref_draws(tmp_path):
    trainer = trainer_of("kto", tmp_path, num_ref_draws=2)
    examples = [trainer.example_builders[0](trainer.train_dataset[3], ExampleKey(3, visit)) for visit in range(4)]
    assert torch.equal(examples[0]["noise"], examples[2]["noise"])
    assert examples[1]["timestep"] == examples[3]["timestep"]
    assert not torch.equal(examples[0]["noise"], examples[1]["noise"])
    # The visit counts, not the epoch that it is in.
    again = trainer.example_builders[0](trainer.train_dataset[3], ExampleKey(3, visit=1, epoch=0))
    assert torch.equal(again["noise"], examples[1]["noise"])
    evaluation = trainer.example_builders[0](trainer.train_dataset[3], ExampleKey(3))
    assert not any(torch.equal(evaluation["noise"], example["noise"]) for example in examples)


def test_evaluation_with_precomputed_reference(tmp_path):
    options = {"eval_dataset": {"a": pairs(5), "b": pairs(3)}, "num_ref_draws": 1}
    live = trained("dpo", tmp_path / "live", **options).evaluate()
    trainer = trained("dpo", tmp_path / "computed", precompute_ref_log_probs=True, **options)
    computed = trainer.evaluate()
    for name in ("eval_a_loss", "eval_b_loss", "eval_a_ref_errors/chosen"):
        assert computed[name] == pytest.approx(live[name], abs=1e-6)
    with pytest.raises(ValueError, match=r"The reference is gone, .*give the evaluation data set to the trainer's"):
        trainer.evaluate(pairs(4))


def test_a_reference_of_ones_own_is_the_one_that_is_precomputed(tmp_path):
    other = tiny_stable_diffusion(seed=5)
    live = trained("dpo", tmp_path / "live", ref_model=copy.deepcopy(other.unet), num_ref_draws=1)
    computed = trained(
        "dpo", tmp_path / "computed", ref_model=other.unet, num_ref_draws=1, precompute_ref_log_probs=True
    )
    assert losses(computed) == losses(live)


# ---- Nothing frozen is run twice, nothing stale is used -------------------------------------------------------------


@contextmanager
def calls() -> Iterator[dict[str, int]]:
    """Counts the calls of VAEs, text encoders and denoisers meanwhile."""
    count = {"vae": 0, "text": 0, "unet": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            count[name] += 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", counting("vae", AutoencoderKL.encode))
        patch.setattr(CLIPTextModel, "forward", counting("text", CLIPTextModel.forward))
        patch.setattr(UNet2DConditionModel, "forward", counting("unet", UNet2DConditionModel.forward))
        yield count


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "trl_diffusion"


def kept(cache: Path) -> list[Path]:
    return [folder for folder in cache.iterdir() if folder.name != "_locks"]


def test_a_second_run_starts_at_once(tmp_path, cache):
    options = {"cache_features": True, "precompute_ref_log_probs": True, "num_ref_draws": 2}
    with calls() as first:
        trained("dpo", tmp_path / "first", **options)
    assert first["vae"] > 0
    assert first["text"] > 0
    # 16 visits in batches of 4, and 4 steps of training: no reference beside the policy.
    assert first["unet"] == 4 + 4
    with calls() as second:  # another beta, another learning rate
        trained("dpo", tmp_path / "second", **options, beta=7.0, learning_rate=1e-6)
    assert second == {"vae": 0, "text": 0, "unet": 4}
    assert len(kept(cache)) == 2


def _scaled(pipeline, module: str):
    parameter = next(getattr(pipeline, module).parameters())
    parameter.data.mul_(1.01)
    return pipeline


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"pipeline": _scaled(tiny_stable_diffusion(), "vae")},
        lambda: {"pipeline": _scaled(tiny_stable_diffusion(), "text_encoder")},
        lambda: {"dataset": pairs(13)},
        lambda: {"random_flip": True},
        lambda: {"resolution": 32},
        lambda: {"features_dtype": "bfloat16"},
        lambda: {"bf16": True},
    ],
    ids=["vae", "text encoder", "data", "flip", "resolution", "dtype", "precision"],
)
def test_a_change_computes_features_anew(tmp_path, cache, change):
    trainer_of("dpo", tmp_path, cache_features=True)
    with calls() as count:
        trainer_of("dpo", tmp_path, cache_features=True, **change())
    assert count["vae"] > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"pipeline": _scaled(tiny_stable_diffusion(), "unet")},
        lambda: {"pipeline": _scaled(tiny_stable_diffusion(), "vae")},
        lambda: {"ref_model": tiny_stable_diffusion(seed=3).unet},
        lambda: {"seed": 1},
        lambda: {"num_ref_draws": 1},
        lambda: {"weighting": "min_snr"},
        lambda: {"max_timestep": 0.5},
        lambda: {"proportion_empty_prompts": 0.5},
        lambda: {"pipeline": tiny_stable_diffusion("v_prediction")},
    ],
    ids=["unet", "vae", "ref_model", "seed", "draws", "weighting", "timesteps", "empty prompts", "prediction type"],
)
def test_a_change_computes_reference_errors_anew(tmp_path, cache, change):
    options = {"precompute_ref_log_probs": True, "num_ref_draws": 2}
    trainer_of("dpo", tmp_path, **options)
    with calls() as count:
        trainer_of("dpo", tmp_path, **options | change())
    assert count["unet"] > 0


@pytest.mark.slow
def test_another_process_knows_them_again(tmp_path, cache):
    """Whatever the seed of Python's hashes, in which sets are ordered."""
    script = """if True:
        from tests.test_features import trainer_of
        trainer_of("dpo", "out", cache_features=True, precompute_ref_log_probs=True, num_ref_draws=1)"""
    for seed in "01":
        environment = os.environ | {"PYTHONHASHSEED": seed, "HF_DATASETS_CACHE": str(cache.parent)}
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=Path(__file__).parents[1])
    assert sorted(folder.name[:9] for folder in kept(cache)) == ["features-", "reference"]


@BOTH
def test_labels_and_the_method_share_the_cache(tmp_path, cache, peft_config):
    trainer_of("dpo", tmp_path, cache_features=True)
    with calls() as count:
        trainer_of("rpo", tmp_path, cache_features=True, peft_config=peft_config)
    assert count["vae"] == 0


def test_a_killed_run_leaves_nothing_that_is_used(tmp_path, cache):
    """Killed while it writes; the next run clears up, and computes what the first should have."""
    if (child := os.fork()) == 0:
        features.write_part = lambda *args: os._exit(1)
        trainer_of("dpo", tmp_path, cache_features=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert [folder.name[:12] for folder in kept(cache)] == ["_incomplete-"]
    trainer_of("dpo", tmp_path, cache_features=True)
    assert [folder.name[:9] for folder in kept(cache)] == ["features-"]


def test_an_incomplete_cache_entry_is_computed_again(tmp_path, cache, caplog):
    """Whatever is missing or cut off: what was written is compared with what is there."""
    options = {"cache_features": True, "precompute_ref_log_probs": True, "num_ref_draws": 1}
    trainer_of("dpo", tmp_path, **options)
    whole = {file: file.read_bytes() for folder in kept(cache) for file in folder.iterdir()}
    assert {file.name for file in whole} >= {"dtypes.json", "errors-00000.arrow", "latents-00000.arrow"}
    for damaged in whole:
        for damage in (damaged.unlink, lambda file=damaged: os.truncate(file, file.stat().st_size // 2)):
            caplog.clear()
            damage()
            trainer_of("dpo", tmp_path, **options)
            assert f"The cache entry {damaged.parent} is incomplete: it is removed and computed again." in caplog.text
            assert {file: file.read_bytes() for file in whole} == whole
    caplog.clear()
    with calls() as count:
        trainer_of("dpo", tmp_path, **options)
    assert count["vae"] == 0
    assert not caplog.text


def in_files(folder: Path) -> datasets.Dataset:
    folder.mkdir()
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
    columns = {"prompt": ["p"] * 4, "label": [True, False] * 2, "image": [str(folder / f"{i}.png") for i in range(4)]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def as_pairs(folder: Path) -> datasets.Dataset:
    rows = in_files(folder).cast_column("image", datasets.Image(decode=False))["image"][:]
    columns = {"prompt": ["p"] * 2, "chosen": rows[:2], "rejected": rows[2:]}
    return datasets.Dataset.from_dict(columns, features=pairs(1).features)


def as_csv(folder: Path) -> datasets.Dataset:
    in_files(folder)
    lines = ["file_name,caption,split", *(f"{i}.png,p,exclusive_{['win', 'lose'][i % 2]}" for i in range(4))]
    (folder / "a.csv").write_text("\n".join(lines))
    return from_kto_csv(folder / "a.csv", folder)


def as_folders(folder: Path) -> datasets.Dataset:
    in_files(folder)
    for i in range(4):
        (folder / f"{i}.txt").write_text("p")
    return from_folders(folder, folder)


def as_imagefolder(folder: Path) -> datasets.Dataset:
    in_files(folder)
    return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")


NAMED_FILES = {
    "cast": in_files,
    "not decoded": lambda folder: in_files(folder).cast_column("image", datasets.Image(decode=False)),
    "selected": lambda folder: in_files(folder).select([2, 1]),
    "shuffled": lambda folder: in_files(folder).shuffle(seed=0),
    "concatenated": lambda folder: datasets.concatenate_datasets([unpaired(3), in_files(folder)]),
    "pairs": as_pairs,
    "unpaired pairs": lambda folder: unpair_preference_dataset(as_pairs(folder)),
    "preferred": lambda folder: select_preferred(as_pairs(folder)),
    "csv": as_csv,
    "folders": as_folders,
    "imagefolder": as_imagefolder,
}


@pytest.mark.parametrize("kind", NAMED_FILES)
def test_the_fingerprint_follows_the_files_that_rows_name(tmp_path, cache, kind):
    dataset = NAMED_FILES[kind](tmp_path / "images")
    before, file = data_fingerprint(dataset), tmp_path / "images" / "1.png"
    assert data_fingerprint(dataset) == before
    time = file.stat().st_mtime_ns
    picture(100, (24, 24)).save(file)
    os.utime(file, ns=(time, time))  # another size
    changed = data_fingerprint(dataset)
    os.utime(file, ns=(time, time + 1))
    assert len({before, changed, data_fingerprint(dataset)}) == 3
    file.unlink()
    assert data_fingerprint(dataset) not in (before, changed)


def test_the_fingerprint_follows_no_other_file(tmp_path, monkeypatch):
    dataset = in_files(tmp_path / "images")
    selected = dataset.select([2, 3])
    before = data_fingerprint(selected)
    (tmp_path / "images" / "1.png").unlink()
    assert data_fingerprint(selected) == before
    # Of images with bytes the path is but a name, whatever lies in the working directory.
    monkeypatch.chdir(tmp_path / "images")
    data = (tmp_path / "images" / "2.png").read_bytes()
    rows = [{"prompt": "p", "image": {"bytes": data, "path": "2.png"}, "label": True}]
    stored = datasets.Dataset(pa.Table.from_pylist(rows)).cast(unpaired(1).features)
    assert data_fingerprint(stored) == stored._fingerprint
    urls = [{"prompt": "p", "image": {"bytes": None, "path": "hf://datasets/a/b/2.png"}, "label": True}]
    assert data_fingerprint(datasets.Dataset.from_list(urls, features=unpaired(1).features))


def test_a_replaced_image_file_computes_everything_again(tmp_path, cache):
    data = as_pairs(tmp_path / "images")
    options = {"cache_features": True, "precompute_ref_log_probs": True, "num_ref_draws": 1}
    options |= {"resolution": [16, "8x16"], "per_device_train_batch_size": 1}
    first = trainer_of("dpo", tmp_path, data, **options)
    same = trainer_of("dpo", tmp_path, data, **options)
    picture(100, (16, 8)).save(tmp_path / "images" / "0.png")
    other = trainer_of("dpo", tmp_path, data, **options)
    for column in ("latents", "ref_errors"):
        assert same.train_dataset[column][:] == first.train_dataset[column][:]
        assert other.train_dataset[column][0] != first.train_dataset[column][0]
        assert other.train_dataset[column][1] == first.train_dataset[column][1]
    assert (same.buckets(same.train_dataset).tolist(), other.buckets(other.train_dataset).tolist()) == ([0, 0], [1, 0])
    before = embed_pairs(data, embed, "tiny")
    picture(101).save(tmp_path / "images" / "0.png")
    after = embed_pairs(data, embed, "tiny")
    assert before["chosen_embedding"][0] != after["chosen_embedding"][0]


def test_the_encoders_leave_the_device_and_come_back_to_draw(tmp_path, monkeypatch):
    trainer = trainer_of("kto", tmp_path, cache_features=True, validation_prompts=["a"], validation_inference_steps=2)
    moves = []
    monkeypatch.setattr(type(trainer), "_move_encoders", lambda self, device: moves.append(str(device)))
    trainer.train()
    # The grid before the first step, and the one after the last.
    assert moves == ["cpu", "cpu"] * 2


# ---- Bad input ------------------------------------------------------------------------------------------------------


def test_no_room_on_the_disk(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**10))
    with pytest.raises(
        ValueError, match=r"The features of 12 rows take about 5\.\d+e-05 GiB, found 9\.54e-07 GiB free"
    ):
        trainer_of("dpo", tmp_path, cache_features=True)
    assert not kept(cache)


def test_an_image_that_cannot_be_read(tmp_path, cache):
    data = pairs(4).cast_column("rejected", datasets.Image(decode=False)).to_list()
    data[2]["rejected"]["bytes"] = b"no picture"
    data = datasets.Dataset.from_list(data, features=pairs(1).features)
    with pytest.raises(ValueError, match=r"The image in row 2 cannot be read .*: replace the file or drop the row\."):
        trainer_of("dpo", tmp_path, data, cache_features=True)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("kto", {"cache_features": True, "center_crop": False}, r"keeps each image with one crop"),
        ("kto", {"features_dtype": "bfloat16"}, r"belongs to `cache_features=True`"),
        ("kto", {"cache_features": True, "features_dtype": "int8"}, r"`features_dtype` must be one of"),
        ("kto", {"num_ref_draws": 0}, r"`num_ref_draws` must be at least 1, found 0"),
        (
            "kto",
            {"precompute_ref_log_probs": True, "reference_point": "mismatched"},
            r"set `reference_point='matched'`",
        ),
        ("rpo", {"num_ref_draws": 2, "timestep_sharing": "window"}, r"set `timestep_sharing='pair'`"),
        ("sft", {"precompute_ref_log_probs": True}, r"compares with no reference: drop `precompute_ref_log_probs`"),
    ],
)
def test_refused(tmp_path, method, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(method, tmp_path, **options)


@pytest.mark.parametrize(
    "option", [{"cache_features": True}, {"precompute_ref_log_probs": True}, {"num_ref_draws": 2}]
)
def test_streams_are_refused(tmp_path, option):
    stream = unpaired().to_iterable_dataset()
    with pytest.raises(ValueError, match=r"comes back to the same rows, found a streaming training data set: drop it"):
        trainer_of("kto", tmp_path, stream, desirable_ratio=None, **option)
