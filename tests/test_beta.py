"""`trl-diffusion beta`: known answers, the trainer's own steps, and the conversion between code bases."""

import math
import re

import numpy as np
import pytest
import torch

from tests.conftest import embed, pairs, unpaired
from tests.test_methods import assert_equal, moved, trained, trainer_of, weights
from tests.tiny import tiny_stable_diffusion
from trl_diffusion.cli import main
from trl_diffusion.cli.arguments import ScriptArguments
from trl_diffusion.cli.beta import random_rows
from trl_diffusion.data import embed_pairs
from trl_diffusion.evaluation import calibrate_beta, convert_beta
from trl_diffusion.evaluation.calibration import find_beta


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("margin", [1e-4, 0.02])
def test_find_beta_of_one_margin(target, margin):
    """DPO's factor is 2 sigmoid(-beta m / 2), KTO's 1 / cosh(beta r / 2)^2."""
    dpo = find_beta(lambda beta: 2 * sigmoid(-beta * margin / 2), target, margin)
    assert dpo == pytest.approx(2 / margin * math.log(2 / target - 1), rel=1e-6)
    kto = find_beta(lambda beta: 1 / math.cosh(min(beta * margin / 2, 300)) ** 2, target, margin)
    assert kto == pytest.approx(2 / margin * math.acosh(target**-0.5), rel=1e-6)


def test_no_beta_where_most_are_on_the_wrong_side():
    assert find_beta(lambda beta: float(np.mean(2 * sigmoid(beta * np.array([1.0, 1.0, -1.0])))), 0.5, 1.0) is None


# ---- With a trainer -------------------------------------------------------------------------------------------------


def test_pairs_that_do_not_move(tmp_path):
    """At a learning rate of 0 the log-ratios are those of policy and reference as given, and the beta is by hand."""
    options = {"pipeline": moved("epsilon"), "learning_rate": 0.0, "max_steps": 1}
    trainer = trainer_of("dpo", tmp_path, ref_model=tiny_stable_diffusion().unet, **options)
    numbers = trainer.predict(trainer.train_dataset).predictions
    ratios = numbers[:, 2:4] - numbers[:, :2]
    margins = ratios[:, 0] - ratios[:, 1]
    found = calibrate_beta(trainer, gradient_factor=0.9, betas=(33.0,))
    assert (found.steps, found.rows) == (1, 12)
    assert found.scale == pytest.approx(np.sqrt((ratios**2).mean()), rel=1e-5)
    assert [found.chosen, found.rejected] == pytest.approx(ratios.mean(0).tolist(), rel=1e-4)

    def factor(beta: float) -> float:
        return float(np.mean(2 * sigmoid(-beta / 2 * margins)))

    assert set(found.factors) >= {33.0, 10.0, 100.0, 1000.0, 10000.0}
    for beta, value in found.factors.items():
        assert value == pytest.approx(factor(beta), abs=1e-4)
    if found.beta is None:
        assert all(factor(beta) > 0.9 for beta in np.logspace(-1, 4, 60))
    else:
        assert factor(found.beta) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("method", ["kto", "rpo", "dpo"])
def test_the_steps_are_the_trainers_own(tmp_path, method):
    """The weights are bit for bit those of a training at a beta of 1, whatever beta the configuration has."""
    data = {"rpo": lambda: embed_pairs(pairs(), embed)}.get(method, {"kto": unpaired, "dpo": pairs}.get(method))()
    options = {"max_steps": 8, "learning_rate": 1e-3}
    calibrated = trainer_of(method, tmp_path / "a", dataset=data, beta=5000.0, **options)
    found = calibrate_beta(calibrated, gradient_factor=0.95)
    plain = trained(method, tmp_path / "b", dataset=data, beta=1.0, **options)
    assert_equal(weights(calibrated), weights(plain))
    assert found.steps == 8
    assert found.chosen > found.rejected
    assert found.beta is not None
    assert found.factors[found.beta] == pytest.approx(0.95, abs=1e-3)
    # The trainer's own metric at this beta.
    plain.args.beta = found.beta
    assert plain.evaluate(data)["eval_health/gradient_factor"] == pytest.approx(0.95, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("sft", {}, r"`DiffusionSFTTrainer` has no beta"),
        ("dpo", {"precompute_ref_log_probs": True}, r"reference is gone.*make a trainer with"),
        ("dpo", {"gradient_factor": 1.0}, r"between 0 and 1, found 1.0"),
        ("dpo", {"learning_rate": 0.0}, r"all 0 after 1 steps: raise `learning_rate` or `max_steps`"),
    ],
)
def test_calibration_refuses(tmp_path, method, options, words):
    factor = {"gradient_factor": options.pop("gradient_factor")} if "gradient_factor" in options else {}
    with pytest.raises(ValueError, match=words):
        calibrate_beta(trainer_of(method, tmp_path, max_steps=1, **options), **factor)


# ---- Conversion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "source", "target", "expected"),
    [
        (5000, "diffusion_dpo", "dpo", 5000),
        (5000, "diffusion_dpo", "kto", 2500),
        (2500, "diffusers_sd", "dpo", 5000),
        (5000, "diffusers_sdxl", "rpo", 5000),
        (1000, "diffusion_kto", "kto", 1000),
        (5000, "diffusion_kto", "dpo", 10000),
        (100, "flow_dpo", "dpo", 100),
        (0.1, "sum", "kto", 1638.4),
        (1638.4, "kto", "sum", 0.1),
    ],
)
def test_conversion(beta, source, target, expected):
    elements = 4 * 64 * 64 if "sum" in (source, target) else None
    assert convert_beta(beta, source, target, latent_elements=elements) == pytest.approx(expected)


def test_conversion_keeps_the_loss():
    """Diffusers' script for SD, its loss written out, against ours at the converted beta."""
    from trl_diffusion.losses import dpo_loss, kto_loss

    chosen, rejected = torch.tensor([1e-3, -2e-4]), torch.tensor([-5e-4, 3e-4])
    theirs = -torch.nn.functional.logsigmoid(2500 * (chosen - rejected))
    ours = dpo_loss(chosen, rejected, beta=convert_beta(2500, "diffusers_sd", "dpo"))
    torch.testing.assert_close(ours, theirs)
    kto = kto_loss(
        chosen, torch.tensor([True, False]), beta=convert_beta(2500, "diffusers_sd", "kto"), reference_point=0.0
    )
    torch.testing.assert_close(kto, 1 - torch.sigmoid(2500 * chosen * torch.tensor([1.0, -1.0])))


@pytest.mark.parametrize(
    ("arguments", "elements", "words"),
    [
        ((1.0, "dpo", "bpo"), None, r"Found no code base 'bpo', expected one of \['diffusers_sd'"),
        ((0.0, "dpo", "kto"), None, r"positive and finite, found 0.0"),
        ((1.0, "sum", "kto"), None, r"expected it with 'sum' and only there"),
        ((1.0, "dpo", "kto"), 16, r"Found latent_elements=16 from 'dpo' to 'kto'"),
        ((1.0, "sum", "kto"), 0, r"at least 1, found 0"),
    ],
)
def test_conversion_refuses(arguments, elements, words):
    with pytest.raises(ValueError, match=words):
        convert_beta(*arguments, latent_elements=elements)


# ---- The command ----------------------------------------------------------------------------------------------------


def test_convert_command(capsys):
    main("beta convert --beta 2500 --source diffusers_sd".split())
    assert capsys.readouterr().out.split("\n")[:3] == ["kto: 2500", "rpo: 5000", "dpo: 5000"]


@pytest.mark.parametrize(("method", "streaming"), [("kto", False), ("dpo", True)])
def test_measure_command(tmp_path, monkeypatch, sd_folder, capsys, method, streaming):
    data = unpaired(12) if method == "kto" else pairs(12)
    data.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet") if (
        tmp_path / "data"
    ).mkdir() is None else None
    monkeypatch.chdir(tmp_path)
    words = ["beta", "measure", method, "--model_name_or_path", sd_folder, "--dataset_name", str(tmp_path / "data")]
    words += "--num_rows 8 --num_steps 2 --learning_rate 1e-4 --beta 123 --gradient_factor 0.99 --use_cpu".split()
    main(
        [*words, "--per_device_train_batch_size", "4", "--disable_tqdm", "true", *streaming * ["--dataset_streaming"]]
    )
    printed = capsys.readouterr().out
    assert "after 2 steps without a brake, 8 rows:" in printed
    table = dict(re.findall(r"^ *(\S+)  (\d\.\d+)", printed, re.MULTILINE))
    assert table["123"] == re.search(r"(\S+) <- yours", printed)[1]
    wanted = re.search(r"(\S+) <- wanted", printed)
    assert wanted is None or float(wanted[1]) == pytest.approx(0.99, abs=1e-3)
    assert (wanted is None) == ("No beta leaves" in printed)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing is left behind


def test_measure_command_refuses(sd_folder, refused):
    words = ["beta", "measure", "dpo", "--model_name_or_path", sd_folder, "--dataset_name", "x", "--use_cpu"]
    assert "`--num_steps` must be at least 1, found 0" in refused(*words, "--num_steps", "0")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_chosen_at_random(tmp_path, monkeypatch, streaming):
    """Sorted by label, as `from_folders` writes them; always the same rows for a seed."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of `datasets`, where a stream is left before its end
    unpaired(60).sort("label").to_parquet(tmp_path / "train.parquet")
    script_args = ScriptArguments(str(tmp_path), dataset_streaming=streaming)
    labels = [[bool(row) for row in random_rows(script_args, 12, seed)["label"]] for seed in (0, 0, 1)]
    assert labels[0] == labels[1] != labels[2]
    assert all(0 < sum(part) < 12 == len(part) for part in labels)
    assert len(random_rows(script_args, 100, 0)) == 60
