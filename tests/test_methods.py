"""Every method on the tiny pipeline: exact start, an independent step, options, resume, splits, streams, metrics."""

import functools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from PIL import Image

from tests.conftest import embed, pairs, picture, unpaired
from tests.methods import METHODS, make_trainer
from tests.tiny import tiny_stable_diffusion
from trl_diffusion.data import CLIPEmbedder, embed_pairs
from trl_diffusion.data.draws import Draws, ExampleKey
from trl_diffusion.data.formats import EMBEDDING_COLUMNS


ALL = pytest.mark.parametrize("method", METHODS)
LORA = LoraConfig(r=4, lora_alpha=8)
BOTH = pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
LOG_2 = torch.tensor(math.log(2)).item()


def trainer_of(method: str, folder, dataset=None, pipeline=None, peft_config=None, **changes):
    """A trainer of the method; `changes` are those of its configuration, or arguments of the trainer."""
    dataset = METHODS[method].data() if dataset is None else dataset
    if method == "rpo" and (
        "embedding_model" in changes
        or not isinstance(dataset, Dataset)
        or EMBEDDING_COLUMNS[0] in dataset.column_names
    ):
        changes.setdefault("embedder", None)  # the data set's, or the trainer's own
    pipeline = pipeline or tiny_stable_diffusion()
    return make_trainer(method, pipeline, folder, dataset, peft_config=peft_config, **{"max_steps": 4} | changes)


def trained(*args, resume=None, **kwargs):
    trainer = trainer_of(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)


# ---- The start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
@BOTH
@pytest.mark.parametrize("method", ["rpo", "dpo"])
def test_first_loss_is_exactly_log_2(tmp_path, method, peft_config, precision):
    """Policy and reference are the same at step 0, dropout or not: every margin is 0.0."""
    trainer = trained(method, tmp_path, peft_config=peft_config, max_steps=1, **precision)
    assert losses(trainer) == [LOG_2]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert logged(trainer, name) == [0.0]
    for side in ("chosen", "rejected"):
        assert logged(trainer, f"errors/{side}") == logged(trainer, f"ref_errors/{side}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"loss_type": "hinge"}, 1.0), ({"loss_type": "ipo"}, (1 / 200) ** 2), ({"label_smoothing": 0.3}, LOG_2)],
    ids=str,
)
def test_first_loss_of_other_kinds_of_dpo(tmp_path, options, expected):
    assert losses(trained("dpo", tmp_path, max_steps=1, **options)) == [pytest.approx(expected, rel=1e-6)]


# ---- One step, written out ------------------------------------------------------------------------------------------


def moved(prediction_type: str):
    """A policy that is no longer its reference."""
    torch.manual_seed(0)
    pipeline = tiny_stable_diffusion(prediction_type)
    with torch.no_grad():
        for p in pipeline.unet.parameters():
            p.add_(0.01 * torch.randn_like(p))
    pipeline.unet.eval()
    return pipeline


class Independent:
    """Errors of single images, with diffusers' own scheduler and encoders; the draws are the library's."""

    def __init__(self, pipeline, images: int, weighting: str = "native"):
        self.pipeline, self.images, self.weighting = pipeline, images, weighting

    @torch.no_grad()
    def error(self, unet, row: int, place: int, image, prompt: str, u: float) -> float:
        draws, shape, scheduler = Draws(42, ExampleKey(row, visit=0)), (4, 8, 8), self.pipeline.scheduler
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = self.pipeline.vae.encode(pixels).latent_dist
        standard = draws.normal("posterior", (self.images, *shape))[place]
        latent = (posterior.mean + posterior.std * standard) * 0.18215
        noise = draws.normal("noise", (1, *shape))
        t = torch.tensor([int(u * 1000)])
        tokens = self.pipeline.tokenizer(
            [prompt], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
        )
        answer = unet(scheduler.add_noise(latent, noise, t), t, self.pipeline.text_encoder(tokens.input_ids)[0]).sample
        predicts_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latent, noise, t) if predicts_v else noise
        snr = compute_snr(scheduler, t).item()
        factor = {"native": 1.0, "min_snr": min(snr, 5.0) / (snr + (1 if predicts_v else 0))}[self.weighting]
        return factor * ((answer - target) ** 2).mean().item()


def own_timestep(row: int) -> float:
    return Draws(42, ExampleKey(row, visit=0)).uniform("timestep")


AS_THEY_COME = {"train_sampling_strategy": "sequential", "proportion_empty_prompts": 0.0}
PARAMETERISATIONS = pytest.mark.parametrize(
    ("prediction_type", "weighting"), [("epsilon", "native"), ("v_prediction", "native"), ("v_prediction", "min_snr")]
)


@PARAMETERISATIONS
def test_rpo_loss_equals_an_independent_computation(tmp_path, prediction_type, weighting):
    """Two windows, each with one timestep for all of its pairs, and rows that weigh differently."""
    policy, reference = moved(prediction_type), tiny_stable_diffusion(prediction_type)
    row_weights = [1.0, 0.5, 2.0, 1.5] * 2
    data = embed_pairs(pairs(8), embed).add_column("weight", row_weights)
    trainer = trained(
        "rpo",
        tmp_path,
        dataset=data,
        pipeline=moved(prediction_type),
        ref_model=reference.unet,
        max_steps=2,
        weighting=weighting,
        temperature=0.3,
        timestep_sharing="window",
        learning_rate=0.0,
        **AS_THEY_COME,
    )

    def cosine(i: int, j: int) -> float:
        a, b = np.array(data[i]["chosen_embedding"]), np.array(data[j]["rejected_embedding"])
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    independent = Independent(policy, images=2, weighting=weighting)
    expected = []
    for window, rows in enumerate((range(4), range(4, 8))):
        u = Draws(42, ExampleKey(0, epoch=0, window=window)).of_window().uniform("timestep")
        ratio = {}
        for row in rows:
            for place, side in enumerate(("chosen", "rejected")):
                image = row, place, data[row][side], data[row]["prompt"], u
                ratio[side, row] = independent.error(reference.unet, *image) - independent.error(policy.unet, *image)
        total = 0.0
        for i in rows:
            near = {j: math.exp(-(1 - cosine(i, j)) / 0.3) for j in rows}
            terms = {j: math.log(1 + math.exp(-50 * (ratio["chosen", i] - ratio["rejected", j]))) for j in rows}
            total += row_weights[i] * sum(near[j] * terms[j] for j in rows) / sum(near.values())
        expected.append(total / 4)
    assert abs(expected[0] - expected[1]) > 0.01
    assert losses(trainer) == pytest.approx(expected, abs=2e-5)


@PARAMETERISATIONS
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_loss_equals_an_independent_computation(tmp_path, method, prediction_type, weighting):
    policy, reference = moved(prediction_type), tiny_stable_diffusion(prediction_type)
    row_weights = [1.0, 0.5, 2.0, 1.5]
    data = pairs(4).add_column("weight", row_weights)
    trainer = trained(
        method,
        tmp_path,
        dataset=data,
        pipeline=moved(prediction_type),
        max_steps=1,
        weighting=weighting,
        **({"ref_model": reference.unet} if method == "dpo" else {}),
        **AS_THEY_COME,
    )
    independent = Independent(policy, images=2 if method == "dpo" else 1, weighting=weighting)
    total = 0.0
    for row, example in enumerate(data):
        error = functools.partial(independent.error, row=row, prompt=example["prompt"], u=own_timestep(row))
        chosen = {"place": 0, "image": example["chosen"]}
        if method == "sft":
            total += row_weights[row] * error(policy.unet, **chosen)
            continue
        rejected = {"place": 1, "image": example["rejected"]}
        margin = error(reference.unet, **chosen) - error(policy.unet, **chosen)
        margin -= error(reference.unet, **rejected) - error(policy.unet, **rejected)
        total += row_weights[row] * math.log(1 + math.exp(-50 * margin))
    assert losses(trainer) == [pytest.approx(total / 4, abs=2e-5)]


def own_loser_first(images, prompts) -> np.ndarray:
    """The prompt alone, so that a pair's two images are the same and those of another prompt are not."""
    return embed(images, prompts)[:, 3:]


@BOTH
def test_rpo_whose_nearest_loser_is_the_own_is_dpo(tmp_path, peft_config):
    data = pairs(12).remove_columns("prompt").add_column("prompt", [f"picture {letter}" for letter in "abcdefghijkl"])
    common = {"dataset": data, "peft_config": peft_config, "optim": "sgd", "learning_rate": 1e-2}
    dpo = trained("dpo", tmp_path, **common)
    rpo = trained("rpo", tmp_path, embedder=own_loser_first, temperature=1e-4, timestep_sharing="pair", **common)
    assert losses(rpo) == pytest.approx(losses(dpo), abs=1e-5)
    assert len(set(losses(dpo))) == 4
    assert_close(weights(dpo), weights(rpo))
    for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "errors/rejected"):
        assert logged(rpo, name) == pytest.approx(logged(dpo, name), abs=1e-3)


# ---- Options --------------------------------------------------------------------------------------------------------

OPTIONS = [
    ("kto", {"weighting": "min_snr", "snr_gamma": 2.0}),
    ("rpo", {}),
    ("rpo", {"embedding": "text"}),
    ("rpo", {"embedding": "image"}),
    ("rpo", {"embedding": "text_image"}),
    ("rpo", {"diagonal": "exclude"}),
    ("rpo", {"diagonal": 0.3}),
    ("rpo", {"weight_placement": "inside"}),
    ("rpo", {"timestep_sharing": "window"}),
    ("rpo", {"noise_sharing": "none"}),
    ("rpo", {"window": "device"}),
    ("rpo", {"temperature": 0.01}),
    ("rpo", {"weighting": "min_snr"}),
    ("dpo", {}),
    ("dpo", {"loss_type": "hinge"}),
    ("dpo", {"loss_type": "ipo"}),
    ("dpo", {"label_smoothing": 0.2}),
    ("dpo", {"weighting": "min_snr"}),
    ("sft", {}),
    ("sft", {"weighting": "epsilon"}),
    ("sft", {"weighting": "min_snr"}),
]
V = {"prediction_type": "v_prediction"}  # of an epsilon model, the epsilon weighting is none


@pytest.fixture(scope="module")
def default_losses(tmp_path_factory):
    """The losses of a method that is left as it is."""
    return functools.cache(
        lambda method: losses(trained(method, tmp_path_factory.mktemp(method), pipeline=tiny_stable_diffusion(**V)))
    )


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=str)
def test_every_option_trains_resumes_and_saves(tmp_path, default_losses, clip_folder, method, options):
    if "embedding" in options:
        options = {**options, "embedding_model": clip_folder}
    make = functools.partial(trainer_of, method, save_strategy="steps", save_steps=2, **options)
    trainer = make(tmp_path / "whole", pipeline=tiny_stable_diffusion(**V))
    start = weights(trainer)
    trainer.train()
    trainer.save_model()
    assert len(losses(trainer)) == 4
    assert all(map(math.isfinite, losses(trainer)))
    # On one rank, a device's window is the whole one.
    assert (losses(trainer) == default_losses(method)) == (options in ({}, {"window": "device"}))
    moved = [name for name, p in weights(trainer).items() if not torch.equal(p, start[name])]
    assert len(moved) > 0.9 * len(start)

    resumed = make(tmp_path / "resumed", pipeline=tiny_stable_diffusion(**V))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(trainer)
    assert_equal(weights(resumed), weights(trainer))

    loaded = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert_equal(dict(loaded.unet.named_parameters()), weights(trainer))


@pytest.mark.parametrize("method", ["rpo", "dpo", "sft"])
def test_lora_trains_resumes_and_saves(tmp_path, sd_folder, method):
    make = functools.partial(trainer_of, method, pipeline=sd_folder, peft_config=LORA, learning_rate=1e-2)
    trainer = make(tmp_path / "whole", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    assert len(set(losses(trainer))) == 4
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(trainer)
    assert_equal(weights(resumed), weights(trainer))
    loaded = DiffusionPipeline.from_pretrained(sd_folder)
    loaded.load_lora_weights(tmp_path / "whole")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, generator=generator), 700, torch.randn(2, 3, 16, generator=generator)
    with torch.no_grad():
        expected, found = (unet.eval()(*inputs, return_dict=False)[0] for unet in (trainer.model, loaded.unet))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("embedding", ["text", "image", "text_image"])
def test_rpo_compares_what_it_is_told_to(tmp_path, clip_folder, embedding):
    data = pairs(4)
    trainer = trainer_of("rpo", tmp_path, dataset=data, embedding=embedding, embedding_model=clip_folder)
    for name, side in zip(EMBEDDING_COLUMNS, ("chosen", "rejected"), strict=True):
        expected = CLIPEmbedder(clip_folder, embedding)(data[side][:], data["prompt"][:])
        np.testing.assert_allclose(trainer.train_dataset[name][:], expected, rtol=0, atol=1e-6)


# ---- Splits and streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_losses_do_not_depend_on_how_a_step_is_split(tmp_path, method):
    common = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 2, "random_flip": True}
    whole, accumulated, read_by_workers = (
        trained(method, tmp_path, **common, **split)
        for split in (
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            {"per_device_train_batch_size": 8, "dataloader_num_workers": 2},
        )
    )
    assert len(set(losses(whole))) == 2
    for other in (accumulated, read_by_workers):
        np.testing.assert_allclose(losses(other), losses(whole), rtol=0, atol=1e-5)
        assert_close(weights(whole), weights(other))


def test_rpo_does_not_depend_on_workers(tmp_path):
    one, two = (trained("rpo", tmp_path, max_steps=2, dataloader_num_workers=n) for n in (0, 2))
    assert losses(one) == losses(two)
    assert_equal(weights(one), weights(two))


@pytest.mark.parametrize("method", ["rpo", "dpo", "sft"])
def test_a_stream_equals_the_map_style_data_set(tmp_path, method):
    data = embed_pairs(pairs(), embed) if method == "rpo" else pairs()
    options = {"max_steps": 3, "train_sampling_strategy": "sequential", "per_device_eval_batch_size": 3}
    mapped = trained(method, tmp_path / "map", dataset=data, eval_dataset=data, **options)
    stream = data.to_iterable_dataset()
    streamed = trained(method, tmp_path / "stream", dataset=stream, eval_dataset=stream, **options)
    assert len(set(losses(mapped))) == 3
    assert losses(streamed) == losses(mapped)
    assert_equal(weights(streamed), weights(mapped))
    one, two = (
        {name: value for name, value in trainer.evaluate().items() if "time" not in name and "second" not in name}
        for trainer in (mapped, streamed)
    )
    assert one == two


def test_a_stream_that_forgot_its_columns_trains(tmp_path):
    """`stream.map(...)` declares none; the embeddings are found all the same."""
    data = embed_pairs(pairs(), embed)
    plain, mapped = data.to_iterable_dataset(), data.to_iterable_dataset().map(lambda row: row)
    one, two = (trained("rpo", tmp_path, dataset=stream, max_steps=2) for stream in (plain, mapped))
    assert losses(one) == losses(two)


@pytest.mark.parametrize("dataset", [pairs(6), unpaired(12), unpaired(12).remove_columns("label")], ids=str)
def test_sft_takes_preferences_too(tmp_path, dataset):
    assert all(map(math.isfinite, losses(trained("sft", tmp_path, dataset=dataset, max_steps=1))))


# ---- Where training leads -------------------------------------------------------------------------------------------


def bright_and_dark() -> Dataset:
    """Pairs that even a small model tells apart in a few steps."""

    def shade(seed: int, lowest: int) -> Image.Image:
        return Image.fromarray(np.asarray(picture(seed)) // 4 + np.uint8(lowest))

    columns = {"prompt": ["picture"] * 6}
    columns |= {"chosen": [shade(i, 190) for i in range(6)], "rejected": [shade(10 + i, 0) for i in range(6)]}
    return Dataset.from_dict(columns, features=pairs(1).features)


@pytest.mark.parametrize(
    ("method", "options"), [("dpo", {}), ("rpo", {"diagonal": 0.9, "timestep_sharing": "pair"})], ids=["dpo", "rpo"]
)
def test_training_prefers_the_chosen_images(tmp_path, method, options):
    data = bright_and_dark()
    trainer = trainer_of(
        method,
        tmp_path,
        dataset=data,
        eval_dataset=data,
        per_device_train_batch_size=6,
        max_steps=16,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        beta=20.0,
        weighting="epsilon",
        proportion_empty_prompts=0.0,
        **options,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert (before["eval_rewards/accuracies"], before["eval_rewards/margins"]) == (0, 0)
    assert before["eval_loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert after["eval_rewards/accuracies"] > 0.8
    assert after["eval_rewards/margins"] > 0.2
    assert after["eval_loss"] < before["eval_loss"] - 0.05


def test_supervised_training_lowers_the_error(tmp_path):
    trainer = trainer_of("sft", tmp_path, eval_dataset=pairs(6), max_steps=10, learning_rate=1e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


# ---- Metrics --------------------------------------------------------------------------------------------------------


def alike(images, prompts) -> np.ndarray:
    """To this embedder everything is related to everything."""
    return np.ones((len(images), 3), np.float32)


def test_contrast_with_everything(tmp_path):
    trainer = trained("rpo", tmp_path, embedder=alike, eval_dataset=pairs(8), max_steps=2)
    assert logged(trainer, "contrast/effective_losers") == pytest.approx([4.0] * 2)
    assert logged(trainer, "contrast/diagonal_weight") == pytest.approx([0.25] * 2)
    evaluation = trainer.evaluate()
    assert evaluation["eval_contrast/effective_losers"] == pytest.approx(4)
    assert evaluation["eval_contrast/diagonal_weight"] == pytest.approx(0.25)


@pytest.mark.parametrize(("diagonal", "losers", "weight"), [("exclude", 3, 0), (0.4, None, 0.4)])
def test_contrast_without_the_own_loser(tmp_path, diagonal, losers, weight):
    trainer = trained("rpo", tmp_path, embedder=alike, diagonal=diagonal, max_steps=1)
    # A row of 0.4 and three times 0.2.
    losers = losers or math.exp(-0.4 * math.log(0.4) - 0.6 * math.log(0.2))
    assert logged(trainer, "contrast/effective_losers") == [pytest.approx(losers)]
    assert logged(trainer, "contrast/diagonal_weight") == [pytest.approx(weight)]


@pytest.mark.parametrize("method", ["rpo", "dpo"])
def test_margins_and_rewards_fit_together(tmp_path, method):
    """A plain mean over all winners and losers is the margin of the means."""
    options = {"embedder": alike} if method == "rpo" else {}
    trainer = trained(method, tmp_path, **options)
    for entry in trainer.state.log_history[:4]:
        assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"], abs=1e-4)
        assert entry["logps/chosen"] == -entry["errors/chosen"]
    assert logged(trainer, "rewards/margins")[-1] != 0


@ALL
def test_row_weights_scale_the_loss(tmp_path, method):
    data = METHODS[method][2](4)
    options = {"max_steps": 1} | ({"train_sampling_strategy": "sequential"} if method != "kto" else {})
    plain = trained(method, tmp_path, dataset=data, **options)
    doubled = trained(method, tmp_path, dataset=data.add_column("weight", [2.0] * 4), **options)
    assert losses(doubled) == [2 * losses(plain)[0]]
    # The same in evaluation.
    one, two = (plain.evaluate(data)["eval_loss"] for data in (plain.train_dataset, doubled.train_dataset))
    assert two == pytest.approx(2 * one, rel=1e-6)


def test_evaluation_of_rpo_does_not_depend_on_the_batch_size(tmp_path):
    """Contrast sets of 4 and 7: what is left over joins the last."""
    trainer = trained("rpo", tmp_path, eval_dataset=pairs(11), max_steps=2)
    results = []
    for batch_size in (1, 4, 11, 1):
        trainer.args.per_device_eval_batch_size = batch_size
        found = trainer.evaluate()
        results.append({name: found[name] for name in found if "time" not in name and "second" not in name})
    assert results[0]["eval_rewards/margins"] != 0
    assert results[0]["eval_contrast/effective_losers"] > 1
    assert results[3] == results[0]
    # The random numbers are the same; what differs is the rounding of convolutions over batches of another size.
    for other in results[1:3]:
        assert other == pytest.approx(results[0], rel=1e-4, abs=1e-3)


def test_evaluation_cuts_its_contrast_sets_as_training_does(tmp_path):
    trainer = trainer_of("rpo", tmp_path, embedder=alike, eval_dataset=pairs(11))
    # 4 winners with 4 losers each, and 7 with 7.
    assert trainer.evaluate()["eval_contrast/effective_losers"] == pytest.approx((4 * 4 + 7 * 7) / 11)
    assert trainer.evaluate(embed_pairs(pairs(3), alike))["eval_contrast/effective_losers"] == pytest.approx(3)


# ---- The model card -------------------------------------------------------------------------------------------------

PAPERS = {"kto": "2404.04465", "rpo": "2406.06382", "dpo": "2311.12908", "sft": "2006.11239"}


@ALL
def test_model_card_names_paper_and_beta(tmp_path, method):
    trainer = trained(method, tmp_path, max_steps=2, **({} if method == "sft" else {"beta": 123.0}))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"https://huggingface.co/papers/{PAPERS[method]}" in card
    assert f"arXiv:{PAPERS[method]}" in card
    assert ("| beta | 123 " in card) == (method != "sft")
    assert f"diffusion-{method}" in card
    # A panel for each curve that the method logs: loss, and margins, accuracies and error growth of a preference.
    assert Image.open(tmp_path / "assets" / "curves.png").size == ((800, 420) if method == "sft" else (1600, 840))


def test_model_card_of_rpo_names_the_embedding(tmp_path, clip_folder):
    made = {
        "text of": trainer_of("rpo", tmp_path, embedding="text", embedding_model=clip_folder),
        "the user's": trainer_of("rpo", tmp_path, embedder=embed, eval_dataset=pairs(4)),
        "columns of the data set": trainer_of("rpo", tmp_path, dataset=embed_pairs(pairs(), embed)),
    }
    for name, trainer in made.items():
        assert trainer.card_settings()["embedding"].startswith(name)


@ALL
def test_an_evaluation_leaves_no_row_out(tmp_path, method):
    """`dataloader_drop_last` is for steps of a training; Trainer applies it to an evaluation's last batch too."""
    data, found = METHODS[method].data(7), []
    for drop in (False, True):
        options = {"dataloader_drop_last": drop, "per_device_eval_batch_size": 4}
        trainer = trainer_of(method, tmp_path, eval_dataset=data, **options)
        metrics = trainer.evaluate()
        found.append({name: value for name, value in metrics.items() if "time" not in name and "second" not in name})
        assert trainer.args.dataloader_drop_last is drop
    assert found[0] == found[1]
