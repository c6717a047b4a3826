"""The implicit reward on held-out preferences: by hand, by timestep, and from the command line."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from tests.conftest import embed, pairs, unpaired
from tests.test_methods import moved, trained, trainer_of
from tests.tiny import tiny_stable_diffusion
from trl_diffusion.cli import main
from trl_diffusion.data import embed_pairs
from trl_diffusion.data.draws import EVALUATION, Draws, ExampleKey
from trl_diffusion.evaluation import implicit_accuracy


def by_hand(policy, reference, rows, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """`e_ref - e_theta` of shape `(draws, rows, images)`, and the place in the noise range of each draw."""
    columns = [name for name in ("chosen", "rejected", "image") if name in rows.column_names]
    ratios, places = np.zeros((num_draws, len(rows), len(columns))), np.zeros((num_draws, len(rows)))
    for draw in range(num_draws):
        for i, row in enumerate(rows):
            draws = Draws(42, ExampleKey(draw * len(rows) + i, EVALUATION))
            places[draw, i] = u = draws.uniform("timestep")
            t, noise = torch.tensor([int(1000 * u)]), draws.normal("noise", (1, 4, 8, 8))
            posterior_noise = draws.normal("posterior", (len(columns), 4, 8, 8))
            for k, column in enumerate(columns):
                pixels = torch.from_numpy(np.array(row[column])).permute(2, 0, 1)[None] / 127.5 - 1
                posterior = policy.vae.encode(pixels).latent_dist
                x_t = policy.scheduler.add_noise(
                    0.18215 * (posterior.mean + posterior.std * posterior_noise[k]), noise, t
                )
                tokens = policy.tokenizer(
                    [row["prompt"]], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
                )
                text = policy.text_encoder(tokens.input_ids)[0]
                e_ref, e = (
                    ((unet(x_t, t, text).sample - noise) ** 2).mean().item() for unet in (reference, policy.unet)
                )
                ratios[draw, i, k] = e_ref - e
    return ratios, places


@torch.no_grad()
def test_pairs_by_hand(tmp_path):
    rows, reference = pairs(6), tiny_stable_diffusion().unet.eval()
    trainer = trainer_of("dpo", tmp_path, pipeline=moved("epsilon"), ref_model=tiny_stable_diffusion().unet)
    found = implicit_accuracy(trainer, rows, num_draws=3, num_bins=2)
    ratios, places = by_hand(moved("epsilon"), reference, rows, 3)
    means = 100 * ratios.mean(0)
    assert found.accuracy.rate == pytest.approx((means[:, 0] > means[:, 1]).mean())
    assert (found.accuracy.n, found.reference_point) == (6, 0.0)
    assert [found.chosen, found.rejected] == pytest.approx(means.mean(0).tolist(), abs=1e-3)
    for i, part in enumerate(found.bins):
        here = (places * 2).astype(int) == i
        kept = here.any(0)
        gain = ((ratios[..., 0] - ratios[..., 1]) * here).sum(0)[kept]
        assert (part.n, part.rate) == (kept.sum(), pytest.approx((gain > 0).mean()))
    # One draw is the trainer's own evaluation.
    metrics = trainer.evaluate(rows)
    assert implicit_accuracy(trainer, rows, num_draws=1).chosen == pytest.approx(metrics["eval_rewards/chosen"])
    assert implicit_accuracy(trainer, rows, num_draws=1).accuracy.rate == pytest.approx(
        metrics["eval_rewards/accuracies"]
    )


@torch.no_grad()
def test_single_images_by_hand(tmp_path):
    rows, reference = unpaired(7), tiny_stable_diffusion().unet.eval()
    trainer = trainer_of("kto", tmp_path, pipeline=moved("epsilon"), ref_model=tiny_stable_diffusion().unet)
    found = implicit_accuracy(trainer, rows, num_draws=2)
    means = 100 * by_hand(moved("epsilon"), reference, rows, 2)[0].mean(0)[:, 0]
    point, liked = max(0.0, means.mean()), np.array(rows["label"][:])
    assert found.reference_point == pytest.approx(point, abs=1e-3)
    assert found.accuracy.rate == ((means > point) == liked).mean()
    assert found.chosen == pytest.approx(means[liked].mean(), abs=1e-3)
    assert found.rejected == pytest.approx(means[~liked].mean(), abs=1e-3)


@pytest.mark.parametrize("method", ["rpo", "dpo"])
def test_an_untrained_policy_ties(tmp_path, method):
    found = implicit_accuracy(trainer_of(method, tmp_path), embed_pairs(pairs(4), embed), num_draws=2)
    assert found.accuracy.rate == 0.5
    assert (found.chosen, found.rejected) == (0.0, 0.0)
    assert found.accuracy.low < 0.5 < found.accuracy.high


def test_features_are_of_no_matter(tmp_path):
    """Computed features give the same rewards, of other copies too."""
    found = [
        implicit_accuracy(
            trainer_of(
                "dpo",
                tmp_path,
                pipeline=moved("epsilon"),
                ref_model=tiny_stable_diffusion().unet,
                cache_features=cached,
            ),
            pairs(5),
            num_draws=3,
        )
        for cached in (False, True)
    ]
    assert found[0].accuracy == found[1].accuracy
    assert found[1].chosen == pytest.approx(found[0].chosen, abs=1e-3)


def test_precomputed_errors_are_of_other_draws(tmp_path):
    with pytest.raises(ValueError, match=r"reference is gone.*make a trainer with `precompute_ref_log_probs=False`"):
        implicit_accuracy(trainer_of("dpo", tmp_path, precompute_ref_log_probs=True), pairs(4))


def test_rpo_and_dpo_agree(tmp_path):
    """The reward is the model's, whatever it was trained with."""
    found = [
        implicit_accuracy(
            trainer_of(method, tmp_path, pipeline=moved("epsilon"), ref_model=tiny_stable_diffusion().unet),
            embed_pairs(pairs(4), embed),
        )
        for method in ("rpo", "dpo")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("dpo", {"num_draws": 0}, r"at least 1, found 0 and 4"),
        ("dpo", {"confidence": 1.0}, r"between 0 and 1, found 1.0"),
        ("dpo", {"dataset": pairs(2).to_iterable_dataset()}, r"found IterableDataset.*load it without streaming"),
        ("sft", {}, r"`DiffusionSFTTrainer` has no reference.*use `DiffusionDPOTrainer`"),
        ("kto", {"dataset": unpaired(6).filter(lambda label: label, input_columns="label")}, r"labels are True"),
        ("dpo", {"dataset": unpaired(4)}, r"evaluation data set is unpaired"),
    ],
)
def test_refusals(tmp_path, method, changes, words):
    changes = {"dataset": pairs(4)} | changes
    with pytest.raises(ValueError, match=words):
        implicit_accuracy(trainer_of(method, tmp_path), changes.pop("dataset"), **changes)


# ---- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    pairs(6).to_parquet(folder / "test-00000-of-00001.parquet")
    return str(folder)


def options(model: str, base: str, data: str, output) -> list[str]:
    words = ["evaluate", "--model_name_or_path", model, "--baseline_name_or_path", base, "--dataset_name", data]
    return [*words, "--num_draws", "2", "--batch_size", "3", "--output_dir", str(output)]


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, init_lora_weights=False)], ids=["full", "lora"])
def test_command(tmp_path, sd_folder, held_out, capsys, peft_config):
    trainer = trained(
        "dpo",
        tmp_path / "run",
        pipeline=sd_folder,
        peft_config=peft_config,
        learning_rate=1e-3,
        max_steps=1,
        beta=1.0,
    )
    trainer.save_model()
    main(options(str(tmp_path / "run"), sd_folder, held_out, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "implicit.json").read_text())
    expected = implicit_accuracy(
        trainer_of(
            "dpo",
            tmp_path,
            pipeline=trainer_pipeline(trainer),
            ref_model=DiffusionPipeline.from_pretrained(sd_folder).unet,
            beta=1.0,
            seed=0,
        ),
        pairs(6),
        num_draws=2,
    )
    assert report["accuracy"] == expected.accuracy._asdict()
    assert report["chosen"] == pytest.approx(expected.chosen, rel=1e-3)
    assert report["chosen"] != report["rejected"]
    assert (tmp_path / "out" / "implicit.md").read_text() in capsys.readouterr().out


def test_command_with_labels(tmp_path, sd_folder):
    (tmp_path / "data").mkdir()
    unpaired(5).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    main(options(sd_folder, sd_folder, str(tmp_path / "data"), tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "implicit.json").read_text())
    # Of an untrained policy every image is at the reference point.
    assert (report["accuracy"]["rate"], report["accuracy"]["n"], report["reference_point"]) == (0.5, 5, 0.0)
    first = (tmp_path / "out" / "implicit.md").read_text()
    assert "images on their side of the reference point" in first
    # Another policy does not overwrite it.
    shutil.copytree(sd_folder, tmp_path / "second" / "model")
    second = options(str(tmp_path / "second" / "model"), sd_folder, str(tmp_path / "data"), tmp_path / "out")
    main([*second, "--resolution", "8x16"])
    assert (tmp_path / "out" / "implicit.md").read_text() == first
    assert (tmp_path / "out" / "second-model" / "implicit.md").exists()


def trainer_pipeline(trainer):
    """The trained pipeline with its adapter merged, if it has one."""
    if hasattr(trainer.model, "merge_and_unload"):
        trainer.pipeline.unet = trainer.model.merge_and_unload()
    return trainer.pipeline


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--dataset_split", "train"], r"has no split 'train': found \['test'\]; choose with `--dataset_split`"),
        (["--scorers", "clip"], r"Found `--scorers` and `--dataset_name`.*expected `--prompts_file` with `--scorers`"),
        (["--num_draws", "0"], r"--num_draws: found 0, expected a whole number of at least 1"),
    ],
)
def test_command_refuses(tmp_path, sd_folder, held_out, refused, changes, words):
    assert re.search(words, refused(*options(sd_folder, sd_folder, held_out, tmp_path), *changes))


def test_command_with_nothing_to_compare_with(tmp_path, refused):
    message = refused(
        "evaluate", "--model_name_or_path", "x", "--baseline_name_or_path", "y", "--output_dir", tmp_path
    )
    assert "Found nothing to compare with, expected" in message
