"""Real processes: the same training on one rank and on two (gloo)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


SCRIPT = Path(__file__).parent / "scripts" / "train.py"
COMMON = {"max_steps": 4, "learning_rate": 1e-2, "optim": "sgd", "save_strategy": "no"}
BETA = {"kto": {"beta": 100.0}, "rpo": {"beta": 100.0}, "dpo": {"beta": 100.0}, "sft": {}}


def launch(ranks: int, runs: list[dict], cache: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(cache)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(SCRIPT)]
    return subprocess.run(
        [*command, json.dumps([COMMON | BETA[run.get("method", "kto")] | run for run in runs])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
    )


def result(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "log.json").read_text()), load_file(folder / "trained.safetensors")


VARIANTS: dict[str, dict] = {
    "full": {},
    "lora": {"lora": True},
    "stream": {"stream": True, "desirable_ratio": None},
    "device": {"window": "device", "beta": 1000.0},
    "rpo": {"method": "rpo"},
    "rpo, a timestep per window": {"method": "rpo", "timestep_sharing": "window", "diagonal": 0.3},
    "rpo, device": {"method": "rpo", "window": "device"},
    "dpo": {"method": "dpo"},
    "dpo, winner guard": {"method": "dpo", "winner_guard": 0.9},
    "sft": {"method": "sft"},
    "step": {"window": "step", "gradient_accumulation_steps": 2},
    "rpo, step": {"method": "rpo", "window": "step", "gradient_accumulation_steps": 2},
    "buckets": {"buckets": True, "resolution": ["16", "16x24"]},
    "rpo, buckets": {"method": "rpo", "buckets": True, "resolution": ["16", "16x24"]},
    "features": {"cache_features": True, "random_flip": True},
    "all computed once": {"method": "dpo", "cache_features": True, "precompute_ref_log_probs": True},
    # Two steps make an epoch: at its end, and in the midst of the second one.
    "resumed": {"save_strategy": "steps", "save_steps": 2},
    "resumed in an epoch": {"save_strategy": "steps", "save_steps": 3},
}
RESUMED = [name for name in VARIANTS if name.startswith("resumed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every variant on one rank with a batch of 8, and on two ranks with a batch of 4."""
    folder = tmp_path_factory.mktemp("processes")
    for ranks in (1, 2):
        runs = [
            {"output_dir": str(folder / f"{name}-{ranks}"), "per_device_train_batch_size": 8 // ranks, **options}
            for name, options in VARIANTS.items()
        ]
        if ranks == 2:
            for name, run in zip(VARIANTS, runs, strict=True):
                if name in RESUMED:
                    run["resume"] = str(folder / f"{name}-1" / f"checkpoint-{run['save_steps']}")
        done = launch(ranks, runs, folder / f"cache-{ranks}")
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def assert_same_training(one, two) -> None:
    (log_one, weights_one), (log_two, weights_two) = one, two
    assert len(log_one["train"]) == len(log_two["train"]) == 4
    for a, b in zip(log_one["train"], log_two["train"], strict=True):
        assert a.keys() == b.keys()
        contrast = ("contrast/effective_losers", "contrast/diagonal_weight")
        for name in ("loss", "kl", *contrast, "errors/chosen", "ref_errors/chosen", "logps/chosen"):
            if name in a:
                assert b[name] == pytest.approx(a[name], abs=1e-5), (name, a["step"])
        # The last digit may decide on which side of 0 one of eight pairs lies.
        if "rewards/accuracies" in a:
            assert b["rewards/accuracies"] == pytest.approx(a["rewards/accuracies"], abs=0.126), a["step"]
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):  # beta times as large
            if name in a:
                assert b[name] == pytest.approx(a[name], abs=1e-3), (name, a["step"])
    assert log_one["eval"].keys() == log_two["eval"].keys()
    for name in ("eval_loss", "eval_kl", "eval_errors/chosen", "eval_errors/rejected"):
        if name in log_one["eval"]:
            assert log_two["eval"][name] == pytest.approx(log_one["eval"][name], abs=1e-5), name
    for name, weight in weights_one.items():
        torch.testing.assert_close(weights_two[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full", "lora", "stream", "step"])
def test_two_ranks_train_as_one_does(folder, variant):
    """The reference point spans both ranks (`window="batch"`), the draws belong to the examples."""
    one, two = result(folder / f"{variant}-1"), result(folder / f"{variant}-2")
    assert len({entry["loss"] for entry in one[0]["train"]}) > 1
    assert variant == "stream" or any(entry["kl"] > 0 for entry in one[0]["train"])
    assert_same_training(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["rpo", "rpo, a timestep per window", "rpo, step", "dpo", "dpo, winner guard", "sft"]
)
def test_two_ranks_train_on_pairs_as_one_does(folder, variant):
    """RPO's winners of one rank meet the losers of the other, with a gradient to both."""
    one, two = result(folder / f"{variant}-1"), result(folder / f"{variant}-2")
    losses = [entry["loss"] for entry in one[0]["train"]]
    assert max(losses) - min(losses) > 1e-3
    assert_same_training(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["buckets", "rpo, buckets"])
def test_two_ranks_train_in_buckets_as_one_does(folder, variant):
    """Whose batches are all of one size, in evaluation too."""
    one, two = result(folder / f"{variant}-1"), result(folder / f"{variant}-2")
    assert len({entry["loss"] for entry in one[0]["train"]}) > 1
    assert_same_training(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["device", "rpo, device"])
def test_the_window_of_a_device_is_another_statistic(folder, variant):
    """With `window="device"` each rank has a window of its own: the tests above would notice."""
    one, two = ([entry["loss"] for entry in result(folder / f"{variant}-{n}")[0]["train"]] for n in (1, 2))
    assert one != pytest.approx(two, abs=1e-5)


@pytest.mark.slow
def test_ranks_share_the_work_of_embedding(folder):
    """Each embeds its part of the rows; the parts make up what one rank gets. All runs of a launch share one cache."""
    one, two = (result(folder / f"rpo-{ranks}")[0]["embeddings"] for ranks in (1, 2))
    assert len(one[0]) == len(one[1]) == 12
    assert one == two
    for ranks in (1, 2):
        everything = (folder / f"cache-{ranks}" / "trl_diffusion").iterdir()
        cached = [data for data in everything if not data.name.startswith(("_locks", "features-", "reference-"))]
        # Of training and of evaluation data: embeddings, with and without buckets, and sizes, of images and of pairs.
        assert len(cached) == 2 * (2 + 2)
        for data in cached:
            assert len(list(data.glob("part-*.arrow"))) == ranks


@pytest.mark.slow
@pytest.mark.parametrize("variant", RESUMED)
def test_resume_on_another_number_of_ranks(folder, variant):
    assert_same_training(result(folder / f"{variant}-1"), result(folder / f"{variant}-2"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_ranks(tmp_path):
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e30, "max_grad_norm": 0.0}
    done = launch(2, [{"output_dir": str(tmp_path), **options}], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("FloatingPointError: The loss or its gradient stopped being finite at step") == 2
