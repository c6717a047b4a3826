"""What RPO, DPO and SFT refuse before the first step, in a sentence that says what to do."""

import math
from pathlib import Path

import pytest
from datasets import Dataset, List, Value
from transformers import CLIPTextConfig, CLIPTextModel

from tests.conftest import embed, pairs, unpaired
from tests.methods import METHODS
from tests.test_methods import trainer_of
from tests.tiny import tiny_stable_diffusion, tiny_tokenizer
from trl_diffusion.data import embed_pairs
from trl_diffusion.data.formats import EMBEDDING_COLUMNS


PAIRED = pytest.mark.parametrize("method", ["rpo", "dpo"])
STREAMING = pytest.mark.parametrize("streaming", [False, True])


def as_stream(dataset: Dataset, streaming: bool):
    return dataset.to_iterable_dataset() if streaming else dataset


# ---- Data -----------------------------------------------------------------------------------------------------------


@STREAMING
@PAIRED
def test_single_images_with_a_label(tmp_path, method, streaming):
    with pytest.raises(ValueError, match=r"training data set is unpaired.*chosen and rejected.*`DiffusionKTOTrainer`"):
        trainer_of(method, tmp_path, dataset=as_stream(unpaired(), streaming))
    with pytest.raises(ValueError, match=r"evaluation data set is unpaired.*`DiffusionKTOTrainer`"):
        trainer_of(method, tmp_path, eval_dataset=as_stream(unpaired(), streaming))


@PAIRED
@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_misnamed_column_of_pairs(tmp_path, method, name):
    with pytest.raises(ValueError, match=rf"lacks the column '{name}': found .*'other'.*rename_column"):
        trainer_of(method, tmp_path, dataset=pairs().rename_column(name, "other"))


def test_supervised_data_without_images(tmp_path):
    with pytest.raises(ValueError, match=r"training data set lacks the column 'image'"):
        trainer_of("sft", tmp_path, dataset=pairs().remove_columns(["chosen", "rejected"]))


def test_nothing_to_imitate(tmp_path):
    dataset = unpaired(4).remove_columns("label").add_column("label", [False] * 4)
    with pytest.raises(ValueError, match=r"All 4 labels of the data set are False, expected liked images"):
        trainer_of("sft", tmp_path, dataset=dataset)


def test_supervised_training_has_no_reference(tmp_path):
    with pytest.raises(ValueError, match=r"compares with no reference: drop `ref_model`"):
        trainer_of("sft", tmp_path, ref_model=tiny_stable_diffusion(seed=1).unet)


def test_one_pair_is_no_contrast_set(tmp_path):
    with pytest.raises(ValueError, match=r"training data set has one pair.*at least 2, or `DiffusionDPOTrainer`"):
        trainer_of("rpo", tmp_path, dataset=pairs(1))
    with pytest.raises(ValueError, match=r"evaluation data set has one pair"):
        trainer_of("rpo", tmp_path, eval_dataset=pairs(1))


@pytest.mark.parametrize("window", ["batch", "device"])
def test_window_of_one_pair(tmp_path, window):
    with pytest.raises(
        ValueError,
        match=rf"per_device_train_batch_size=1 with window='{window}'.*at least 2, or.*`DiffusionDPOTrainer`",
    ):
        trainer_of("rpo", tmp_path, per_device_train_batch_size=1, window=window)


def test_pairs_of_one_train_by_dpo(tmp_path):
    trainer_of("dpo", tmp_path, dataset=pairs(1), per_device_train_batch_size=1, max_steps=1).train()


# ---- Embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
def test_stream_without_embeddings(tmp_path, declared):
    stream = pairs().to_iterable_dataset()
    if not declared:
        stream = stream.map(lambda row: row)
    with pytest.raises(ValueError, match=r"streaming training data set has no columns .*data\.embed_pairs`, or load"):
        trainer_of("rpo", tmp_path, dataset=stream)
    with pytest.raises(ValueError, match=r"streaming evaluation data set has no columns"):
        trainer_of("rpo", tmp_path, eval_dataset=stream)


def test_embedder_and_embeddings(tmp_path):
    with pytest.raises(
        ValueError, match=r"Found an `embedder`, and the columns .* in the training data set: drop one"
    ):
        trainer_of("rpo", tmp_path, dataset=embed_pairs(pairs(), embed), embedder=embed)


@STREAMING
@pytest.mark.parametrize("name", EMBEDDING_COLUMNS)
@pytest.mark.parametrize(
    ("values", "feature", "found"),
    [
        ([[1, 2]] * 12, List(Value("int64")), "int64"),
        ([0.5] * 12, Value("float32"), "float32"),
        (["0.5 0.5"] * 12, Value("string"), "string"),
        ([[[0.5]]] * 12, List(List(Value("float32"))), r"List\(List"),
    ],
    ids=["integers", "numbers", "text", "matrices"],
)
def test_embeddings_of_another_type(tmp_path, name, values, feature, found, streaming):
    dataset = embed_pairs(pairs(), embed).remove_columns(name).add_column(name, values, feature=feature)
    with pytest.raises(
        ValueError, match=rf"'{name}' of the training data set is .*{found}.*expected vector: make it a list of floats"
    ):
        trainer_of("rpo", tmp_path, dataset=as_stream(dataset, streaming))


def test_embeddings_that_are_none(tmp_path):
    values = [[0.5, 0.5]] * 7 + [None] + [[0.5, 0.5]] * 4
    dataset = embed_pairs(pairs(), embed).remove_columns("chosen_embedding")
    dataset = dataset.add_column("chosen_embedding", values, feature=List(Value("float32")))
    with pytest.raises(ValueError, match=r"'chosen_embedding' of the training data set is None in row 7"):
        trainer_of("rpo", tmp_path, dataset=dataset)


@STREAMING
@pytest.mark.parametrize("name", EMBEDDING_COLUMNS)
def test_one_of_two_embeddings(tmp_path, name, streaming):
    dataset = as_stream(embed_pairs(pairs(), embed).remove_columns(name), streaming)
    with pytest.raises(ValueError, match=rf"training data set lacks the column '{name}': found"):
        trainer_of("rpo", tmp_path, dataset=dataset, embedding_model="not used")


@pytest.mark.parametrize("name", EMBEDDING_COLUMNS)
@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([0.5] * 4, r"has 4 numbers in row 7, expected 5: all embeddings must have the same length"),
        ([], r"has 0 numbers in row 7, expected 5"),
        ([0.5, 0.5, math.nan, 0.5, 0.5], r"is not finite in row 7"),
        ([0.5, 0.5, -math.inf, 0.5, 0.5], r"is not finite in row 7"),
        ([0.5, 0.5, None, 0.5, 0.5], r"is not finite in row 7"),
    ],
    ids=["shorter", "empty", "nan", "inf", "None"],
)
def test_an_embedding_that_is_not_like_the_others(tmp_path, name, vector, message):
    dataset = embed_pairs(pairs(), embed)
    values = [*dataset[name][:7], vector, *dataset[name][8:]]
    dataset = dataset.remove_columns(name).add_column(name, values, feature=dataset.features[name])
    with pytest.raises(ValueError, match=rf"Column '{name}' of the training data set {message}"):
        trainer_of("rpo", tmp_path, dataset=dataset)


def test_embeddings_without_numbers(tmp_path):
    dataset = pairs(4)
    for name in EMBEDDING_COLUMNS:
        dataset = dataset.add_column(name, [[]] * 4, feature=List(Value("float32")))
    with pytest.raises(ValueError, match=r"'chosen_embedding' of the training data set has 0 numbers in row 0"):
        trainer_of("rpo", tmp_path, dataset=dataset)


@STREAMING
def test_embeddings_of_winners_and_losers_that_differ_in_length(tmp_path, streaming):
    """3 and 7 numbers, whose halves would be taken for 5 and 5."""
    dataset = pairs(4)
    for name, length in zip(EMBEDDING_COLUMNS, (3, 7), strict=True):
        dataset = dataset.add_column(name, [[0.5] * length] * 4, feature=List(Value("float32")))
    with pytest.raises(
        ValueError, match=r"have 3 numbers and those of losers 7|'rejected_embedding' .* has 7 .* row 0"
    ):
        trainer_of("rpo", tmp_path, dataset=as_stream(dataset, streaming)).train()


def test_embedding_model_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"`embedding_model='/no/such/clip'`.*CLIP"):
        trainer_of("rpo", tmp_path, embedding_model="/no/such/clip")


def test_embedding_model_that_is_not_on_the_hub(tmp_path):
    """Offline, as it is here, or misspelt."""
    with pytest.raises(ValueError, match=r"`embedding_model='no-such/clip'`.*CLIP"):
        trainer_of("rpo", tmp_path, embedding_model="no-such/clip")


@pytest.mark.parametrize("content", ["nothing", "another model", "a pipeline", "no processor", "broken weights"])
def test_embedding_model_that_is_no_clip(tmp_path, sd_folder, clip_folder, content):
    folder = tmp_path / "clip"
    folder.mkdir()
    if content == "another model":
        CLIPTextModel(CLIPTextConfig(vocab_size=9, hidden_size=8, num_attention_heads=2)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    elif content == "a pipeline":
        folder = sd_folder
    elif content != "nothing":
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((Path(clip_folder) / name).read_bytes())
        if content == "broken weights":
            (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=rf"`embedding_model='{folder}'`.*CLIP"):
        trainer_of("rpo", tmp_path, embedding_model=str(folder))


# ---- Settings -------------------------------------------------------------------------------------------------------

BETAS = [({"beta": beta}, rf"`beta` must be positive and finite, found {beta}") for beta in (0.0, -1.0, math.inf)]
BETAS.append(({"beta": math.nan}, r"`beta` must be positive and finite, found nan"))
SETTINGS = [
    *[("rpo", *setting) for setting in BETAS],
    *[("dpo", *setting) for setting in BETAS],
    *[
        ("rpo", {"temperature": value}, rf"`temperature` must be positive and finite, found {value}")
        for value in (0.0, -0.1, math.inf, math.nan)
    ],
    *[
        ("rpo", {"diagonal": value}, r"`diagonal` must be 'include', 'exclude' or a number between 0 and 1, found")
        for value in ("own", 0.0, 1.0, -0.5, "1.5", math.nan)
    ],
    ("rpo", {"embedding": "prompt"}, r"`embedding` must be one of .*'text_image'.*found 'prompt'"),
    ("rpo", {"weight_placement": "both"}, r"`weight_placement` must be one of .*'outside'.*found 'both'"),
    ("rpo", {"timestep_sharing": "batch"}, r"`timestep_sharing` must be one of .*'window'.*found 'batch'"),
    ("rpo", {"noise_sharing": "window"}, r"`noise_sharing` must be one of .*'pair'.*found 'window'"),
    ("rpo", {"window": "world"}, r"`window` must be one of .*'device'.*found 'world'"),
    ("dpo", {"loss_type": "kto"}, r"`loss_type` must be one of .*'sigmoid'.*found 'kto'"),
    *[
        ("dpo", {"label_smoothing": value}, rf"`label_smoothing` must be in \[0, 0\.5\), found {value}")
        for value in (-0.1, 0.5, math.nan)
    ],
    ("dpo", {"label_smoothing": 0.1, "loss_type": "ipo"}, r"belongs to `loss_type='sigmoid'`.*'ipo'; set it to 0"),
    *[
        (method, *setting)
        for method in METHODS
        for setting in (
            ({"weighting": "p2"}, r"`weighting` must be one of .*'min_snr'.*found 'p2'"),
            ({"snr_gamma": 3.0}, r"`snr_gamma=3\.0` belongs to `weighting='min_snr'`, found weighting='native'"),
            ({"snr_gamma": 3.0, "weighting": "epsilon"}, r"`snr_gamma=3\.0` belongs to .*found weighting='epsilon'"),
            ({"snr_gamma": 0.0, "weighting": "min_snr"}, r"`snr_gamma` must be positive and finite, found 0\.0"),
            ({"snr_gamma": math.inf, "weighting": "min_snr"}, r"`snr_gamma` must be positive and finite, found inf"),
        )
    ],
]


@pytest.mark.parametrize(("method", "changes", "message"), SETTINGS, ids=lambda v: "" if str(v)[0] in "`b" else str(v))
def test_setting_of_a_method_out_of_range(tmp_path, method, changes, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method][0](str(tmp_path), use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize(("given", "kept"), [("0.3", 0.3), (0.3, 0.3), ("include", "include"), ("exclude", "exclude")])
def test_diagonal_from_the_command_line_is_a_number(tmp_path, given, kept):
    args = METHODS["rpo"][0](str(tmp_path), use_cpu=True, report_to="none", diagonal=given)
    assert args.diagonal == kept
    assert type(args.diagonal) is type(kept)
