"""What the command line says of a wrong input: one line with what was found and how to fix it, and exit code 2."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import httpx
import pytest
import safetensors.torch
from diffusers import ModelMixin
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig
from transformers import PreTrainedModel

from tests.conftest import pairs, unpaired
from trl_diffusion.cli import main
from trl_diffusion.cli.errors import DEBUG, one_line, one_line_errors, suggestion


@pytest.fixture(scope="module")
def places(sd_folder, clip_folder, tmp_path_factory):
    """Files and folders by the names that stand for them in the table."""
    root = tmp_path_factory.mktemp("inputs")

    def file(name: str, content: str | bytes) -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model(name: str, index: str) -> Path:
        return file(f"{name}/model_index.json", index).parent

    unpaired(12).to_parquet((root / "likes").mkdir() or root / "likes" / "train-0.parquet")
    pairs(6).to_parquet((root / "pairs").mkdir() or root / "pairs" / "train-0.parquet")
    unpaired(4).remove_columns("label").to_parquet((root / "bare").mkdir() or root / "bare" / "train-0.parquet")
    (root / "empty").mkdir()
    (root / "adapter").mkdir()
    config = LoraConfig(base_model_name_or_path=str(root / "gone")).to_dict()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config, default=list))
    return {
        "sd": sd_folder,
        "clip": clip_folder,
        "root": root,
        "likes": root / "likes",
        "pairs": root / "pairs",
        "bare": root / "bare",
        "empty": root / "empty",
        "adapter": root / "adapter",
        "text": file("prompts.txt", "a cat\na dog\n"),
        "blank": file("blank.txt", "\n \n"),
        "binary": file("binary.txt", bytes(range(256))),
        "broken_json": file("broken.json", '["a cat", '),
        "number_json": file("number.json", "[1, 2]"),
        "table": file("table.csv", "name,text\nx,y\n"),
        "not_parquet": file("prompts.parquet", b"PAR?"),
        "broken_data": file("broken_data/train.parquet", b"PAR1 no parquet").parent,
        "broken_yaml": file("broken.yaml", "beta: [1\nhub_token: hf_abcdefghijklmnopqrstuvw\n"),
        "list_yaml": file("list.yaml", "- 1\n- 2\n"),
        "empty_yaml": file("empty.yaml", ""),
        "misspelt_yaml": file("misspelt.yaml", "bench_stepz: 3\n"),
        "choice_yaml": file("choice.yaml", "dtype: float61\n"),
        "typed_yaml": file("typed.yaml", "bench_steps: [3]\n"),
        "word_yaml": file("word.yaml", "bench_steps: ten\n"),
        "no_json": model("no_json", "{"),
        "list_json": model("list_json", "[]"),
        "no_class": model("no_class", "{}"),
        "unknown_class": model("unknown_class", '{"_class_name": "UnheardOfPipeline"}'),
        "no_parts": model(
            "no_parts", '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
        ),
        "annotations": file("annotations.csv", "a,b\n1,2\n"),
        "tar": file("broken.tar", b"no tar"),
        "weights": file("weights.safetensors", b"no weights"),
    }


TRAIN = "--model_name_or_path {sd} --output_dir {root}/out --use_cpu"
KTO = f"kto {TRAIN} --dataset_name {{likes}}"
PAIRS = f"{TRAIN} --dataset_name {{pairs}}"
GENERATE = "generate --model_name_or_path {sd} --output_dir {root}/out"
EVALUATE = "evaluate --model_name_or_path {sd} --baseline_name_or_path {sd} --output_dir {root}/out"
SCORE = f"{EVALUATE} --prompts_file {{text}} --scorers clip={{clip}}"
EXPORT = "export --model_name_or_path {sd} --output {root}/out.safetensors"
MEASURE = "beta measure kto --model_name_or_path {sd} --dataset_name {likes} --use_cpu"
INSPECT = "data inspect"

# A command line, and what its answer must hold: what was found, and what is expected or how to fix it.
TABLE = [
    # The command.
    ("", "required: command", "--help"),
    ("ktoo", "'ktoo'", "did you mean 'kto'"),
    ("generat", "'generat'", "did you mean 'generate'"),
    ("train", "'train'", "'sft'"),
    ("--verbose kto", "'--verbose'", "--help"),
    # Options.
    ("env --nonsense", "'--nonsense'", "see `trl-diffusion env --help`"),
    ("env extra", "extra", "see `trl-diffusion env --help`"),
    ("generate --model_name_or_pth {sd} --prompts x --output_dir x", "_pth'", "did you mean '--model_name_or_path'"),
    ("generate", "required: --model_name_or_path, --output_dir", "--help"),
    (f"{GENERATE} --prompts x --num_images 3 --seeds 3", "'--seeds'", "did you mean '--seed'"),
    (f"{GENERATE} --prompts x --dtype=float61", "'float61'", "did you mean 'float16'"),
    (f"{GENERATE} --prompts x --seed", "--seed", "expected one argument"),
    (f"{EVALUATE} --datset_name {{likes}}", "'--datset_name'", "did you mean '--dataset_name'"),
    (f"{EXPORT} --layout kohja", "'kohja'", "did you mean 'kohya'"),
    (f"{EXPORT} --layout kohya --dtyp float16 --merge", "'--merge'", "--help"),
    ("bench --bench_stepz 3", "'--bench_stepz'", "did you mean '--bench_steps'"),
    ("bench --estimate --lora_rank 4", "'--lora_rank'", "did you mean '--lora_r"),
    ("beta mesure kto", "'mesure'", "did you mean 'measure'"),
    ("beta measure sft", "'sft'", "'dpo'"),
    ("beta measure", "required: method", "--help"),
    ("beta convert --beta 1 --sourse kto", "'--sourse'", "did you mean '--source'"),
    ("data inspekt", "'inspekt'", "did you mean 'inspect'"),
    (f"{INSPECT} pikapic", "'pikapic'", "did you mean 'pickapic'"),
    (f"{INSPECT} pickapic --dataset_nmae x", "'--dataset_nmae'", "did you mean '--dataset_name'"),
    # Numbers out of range.
    (f"{GENERATE} --prompts x --num_images_per_prompt 0", "num_images_per_prompt: found 0", "at least 1"),
    (f"{GENERATE} --prompts x --num_images_per_prompt -2", "found -2", "at least 1"),
    (f"{GENERATE} --prompts x --num_inference_steps 0", "num_inference_steps: found 0", "at least 1"),
    (f"{GENERATE} --prompts x --num_inference_steps 2.5", "found 2.5", "a whole number"),
    (f"{GENERATE} --prompts x --seed -1", "seed: found -1", "from 0 to"),
    (f"{GENERATE} --prompts x --seed 99999999999999999999999", "found 99999999999999999999999", "2**32"),
    (f"{GENERATE} --prompts x --guidance_scale nan", "guidance_scale: found nan", "a finite number"),
    (f"{GENERATE} --prompts x --guidance_scale=-inf", "found -inf", "a finite number"),
    (f"{GENERATE} --prompts x --guidance_scale high", "found high", "a finite number"),
    (f"{SCORE} --num_images_per_prompt 0", "num_images_per_prompt: found 0", "at least 1"),
    (f"{SCORE} --num_inference_steps 0", "num_inference_steps: found 0", "at least 1"),
    (f"{SCORE} --max_prompts 0", "max_prompts: found 0", "at least 1"),
    (f"{SCORE} --max_prompts -1", "max_prompts: found -1", "at least 1"),
    (f"{SCORE} --batch_size 0", "batch_size: found 0", "at least 1"),
    (f"{SCORE} --resolution 0", "resolution: found '0'", "expected SIDE"),
    (f"{GENERATE} --prompts x --resolution 0x512", "resolution: found '0x512'", "expected SIDE"),
    (f"{SCORE} --seed -3", "found -3", "from 0 to"),
    (f"{SCORE} --guidance_scale nan", "found nan", "a finite number"),
    (f"{EVALUATE} --dataset_name {{pairs}} --num_draws 0", "num_draws: found 0", "at least 1"),
    ("bench --bench_steps 0", "bench_steps=0", "at least 1"),
    ("bench --bench_steps many", "'many'", "int"),
    ("bench --method ktoo", "'ktoo'", "did you mean 'kto'"),
    ('bench --against "--beta \'1"', "against=", "No closing quotation"),
    ("bench --bench_warmup -1", "bench_warmup=-1", "at least 1"),
    ("bench --estimate --batch_size 0", "batch_size: found 0", "at least 1"),
    ("bench --estimate --lora_r -4", "lora_r: found -4", "at least 1"),
    ("bench --estimate --model sdx", "'sdx'", "did you mean 'sdxl'"),
    ("beta convert --beta 0 --source kto", "beta: found 0", "above 0"),
    ("beta convert --beta nan --source kto", "found nan", "a finite number"),
    ("beta convert --beta much --source kto", "found much", "a finite number"),
    ("beta convert --beta 1 --source simpletuner", "latent_elements=None", "expected it with one of"),
    ("beta convert --beta 1 --source simpletuner --latent_elements 0", "found 0", "at least 1"),
    (f"{MEASURE} --num_rows 0", "num_rows", "at least 1"),
    (f"{MEASURE} --num_steps -1", "found -1", "at least 1"),
    (f"{MEASURE} --gradient_factor 1.5", "found 1.5", "between 0 and 1"),
    (f"{INSPECT} preferences --dataset_name {{likes}} --first_rows -1", "found -1", "at least 0"),
    (f"{KTO} --beta -1", "found -1.0", "must be positive"),
    (f"{KTO} --beta some", "'some'", "float"),
    (f"rpo {PAIRS} --temperature 0", "temperature", "found 0"),
    (f"dpo {PAIRS} --label_smoothing 2", "label_smoothing", "found 2.0"),
    (f"sft {PAIRS} --proportion_empty_prompts 3", "found 3.0", "in [0, 1]"),
    (f"sft {PAIRS} --weighting snr", "'snr'", "min_snr"),
    # Files of prompts.
    (f"{GENERATE}", "--prompts --prompts_file is required", "--help"),
    (f"{GENERATE} --prompts x --prompts_file {{text}}", "not allowed with", "--help"),
    (f"{GENERATE} --prompts_file {{root}}/none.txt", "none.txt'", "one prompt per line"),
    (f"{GENERATE} --prompts_file {{root}}", "{root}'", "one prompt per line"),
    (f"{GENERATE} --prompts_file {{binary}}", "binary.txt'", "UTF-8"),
    (f"{GENERATE} --prompts_file {{blank}}", "blank.txt'", "expected one per line"),
    (f"{EVALUATE} --scorers pick --prompts_file {{root}}/no.txt", "no.txt'", "expected one with prompts"),
    (f"{EVALUATE} --scorers pick --prompts_file {{binary}}", "binary.txt'", "expected prompts"),
    (f"{EVALUATE} --scorers pick --prompts_file {{broken_json}}", "broken.json'", "expected prompts"),
    (f"{EVALUATE} --scorers pick --prompts_file {{number_json}}", "Found 1 in", "expected a prompt"),
    (f"{EVALUATE} --scorers pick --prompts_file {{not_parquet}}", "prompts.parquet'", "expected prompts"),
    (f"{EVALUATE} --scorers pick --prompts_file {{table}}", "['name', 'text']", "expected one of ['prompt'"),
    (f"{EVALUATE} --scorers pick --prompts_file {{blank}}", "blank.txt'", "expected at least one"),
    (f"{EVALUATE} --scorers pick --prompts_file {{weights}}", "weights.safetensors'", "expected one that ends in"),
    (f"{EVALUATE} --prompts_file {{text}} --scorers pickscor", "'pickscor'", "expected one of"),
    (f"{EVALUATE} --prompts_file {{text}} --scorers json:lods", "'json:lods'", "expected"),
    (f"{EVALUATE} --prompts_file {{text}} --scorers clip={{root}}/nowhere", "{root}/nowhere", "expected"),
    (EVALUATE, "Found nothing to compare with", "expected `--prompts_file`"),
    (f"{EVALUATE} --prompts_file {{text}}", "Found `--prompts_file`", "with `--scorers`"),
    # Models.
    ("generate --prompts x --output_dir {root}/out --model_name_or_path {root}/none", "{root}/none'", "expected a"),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path ./none", "'./none'", "expected a"),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path {empty}", "{empty}'", "expected the output"),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path {no_json}", "model_index.json'", "JSON"),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path {list_json}", "model_index.json'", "expected"),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path {no_class}", "'_class_name'", "expected"),
    (
        "generate --prompts x --output_dir {root}/out --model_name_or_path {unknown_class}",
        "'UnheardOfPipeline'",
        "exp",
    ),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path {no_parts}", "'unet'", "expected it"),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path {text}", "prompts.txt'", ".safetensors"),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path some/one", "'some/one'", "HF_HUB_OFFLINE"),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path {adapter}", "{root}/gone'", "expected"),
    ("generate --prompts x --output_dir {root}/out --model_name_or_path {weights}", "{weights}'", "expected"),
    (
        "evaluate --model_name_or_path {sd} --baseline_name_or_path {root}/base --output_dir {root}/out "
        "--dataset_name {pairs}",
        "{root}/base'",
        "--baseline_name_or_path",
    ),
    ("export --layout kohya --model_name_or_path {root}/x --output {root}/o.safetensors", "{root}/x'", "expected a"),
    (f"{EXPORT} --layout kohya", "no adapter_config.json in '{sd}'", "expected"),
    ("export --layout kohya --model_name_or_path {adapter} --output {root}/o.safetensors", "{root}/gone'", "expected"),
    ("bench --use_cpu --model_name_or_path {root}/x", "{root}/x'", "expected a"),
    ("kto --model_name_or_path {root}/x --dataset_name {likes} --output_dir {root}/out --use_cpu", "{root}/x'", "exp"),
    (
        "kto --model_name_or_path some/one --dataset_name {likes} --output_dir {root}/out --use_cpu",
        "'some/one'",
        "HUB",
    ),
    ("rpo --model_name_or_path {empty} --dataset_name {pairs} --output_dir {root}/out --use_cpu", "{empty}'", "exp"),
    # Data.
    (f"kto {TRAIN} --dataset_name {{root}}/none", "{root}/none'", "or a Hub id"),
    (f"kto {TRAIN} --dataset_name {{empty}}", "{empty}'", "expected a Hub id"),
    (f"kto {TRAIN} --dataset_name some/data", "'some/data'", "check the name"),
    (f"kto {TRAIN} --dataset_name {{broken_data}}", "{broken_data}'", "expected whole files"),
    (f"{KTO} --dataset_config nope", "'nope'", "['default']"),
    (f"{KTO} --dataset_train_split nope", "'nope'", "choose with `--dataset_train_split`"),
    (f"kto {TRAIN} --dataset_name {{bare}}", "lacks the column 'label'", "expected"),
    (f"dpo {TRAIN} --dataset_name {{likes}}", "unpaired", "expected prompt, chosen and rejected"),
    (f"rpo {TRAIN} --dataset_name {{bare}}", "lacks the columns 'chosen', 'rejected'", "rename"),
    (f"{MEASURE} --dataset_train_split nope", "'nope'", "['train']"),
    ("beta measure kto --model_name_or_path {sd} --use_cpu --dataset_name {root}/none", "{root}/none'", "Hub id"),
    (f"{EVALUATE} --dataset_name {{root}}/none", "{root}/none'", "or a Hub id"),
    (f"{EVALUATE} --dataset_name {{pairs}} --dataset_split dev", "'dev'", "choose with `--dataset_split`"),
    (f"{EVALUATE} --dataset_name {{bare}} --dataset_split train", "lacks the columns 'chosen'", "expected"),
    (f"{INSPECT} preferences --dataset_name {{root}}/none", "{root}/none'", "or a Hub id"),
    (f"{INSPECT} preferences --dataset_name {{broken_data}}", "{broken_data}'", "expected whole files"),
    (f"{INSPECT} preferences --dataset_name {{likes}} --dataset_split dev", "'dev'", "['train']"),
    (f"{INSPECT} pickapic --dataset_name {{likes}}", "of Pick-a-Pic: found ['image'", "rename"),
    (f"{INSPECT} kto_csv --annotations {{annotations}} --image_dir {{root}}", "['a', 'b']", "expected"),
    (f"{INSPECT} kto_csv --annotations {{root}}/no.csv --image_dir {{root}}", "{root}/no.csv'", "check the path"),
    (f"{INSPECT} hpdv3 --annotations {{text}} --image_dir {{root}}", "prompts.txt", "expected a JSON array"),
    (f"{INSPECT} folders --liked_dir {{empty}} --disliked_dir {{empty}}", "no image in '{empty}'", "expected"),
    (f"{INSPECT} scores --dataset_name {{likes}}", "threshold=None", "expected"),
    (f"{INSPECT} webdataset --files {{root}}/none.tar", "{root}/none.tar'", "expected"),
    (f"{INSPECT} webdataset --files {{tar}}", "broken.tar", "expected"),
    ("data convert preferences --dataset_name {likes} --output_dir {text}", "prompts.txt", "expected a folder"),
    # Files of options.
    ("bench --config", "--config", "expected a YAML file"),
    ("bench --config {root}/none.yaml", "none.yaml'", "expected a YAML file"),
    ("bench --config={root}/none.yaml", "none.yaml'", "expected a YAML file"),
    ("bench --config {broken_yaml}", "broken.yaml' in line 2", "correct it"),
    ("bench --config {binary}", "binary.txt'", "expected a YAML file"),
    ("bench --config {list_yaml}", "a list in", "expected options"),
    ("bench --config {empty_yaml}", "nothing in", "expected options"),
    ("bench --config {misspelt_yaml}", "'bench_stepz'", "did you mean 'bench_steps'"),
    ("bench --config {choice_yaml}", "float61", "did you mean 'float16'"),
    ("bench --config {typed_yaml}", "bench_steps: [3]", "expected a number"),
    ("bench --config {word_yaml}", "'ten'", "int"),
    ("kto --config {root}/none.yaml", "none.yaml'", "expected a YAML file"),
    ("dpo --config {broken_yaml}", "broken.yaml' in line 2", "correct it"),
    ("sft --config {choice_yaml} " + PAIRS, "float61", "did you mean 'float16'"),
    ("beta measure rpo --config {list_yaml}", "a list in", "expected options"),
    # What is in the way.
    ("generate --model_name_or_path {sd} --prompts x --output_dir {text}", "prompts.txt'", "expected a folder"),
    ("generate --model_name_or_path {sd} --prompts x --output_dir {text}/out", "prompts.txt'", "expected a folder"),
    (f"{SCORE} --output_dir {{text}}", "prompts.txt'", "expected a folder"),
    ("export --layout merged --model_name_or_path {sd} --output {text}", "{text}", "expected a name"),
    ("export --layout single_file --model_name_or_path {sd} --output {root}", "{root}", "expected"),
    ("bench --use_cpu --json_file {root}", "{root}", "expected a file"),
    ("bench --use_cpu --json_file {root}/none/x.json", "{root}/none", "expected a file"),
]


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever loads weights is not called."""

    def loaded(*args, **kwargs):
        pytest.fail("weights are loaded before the input is checked")

    monkeypatch.setattr(ModelMixin, "from_pretrained", loaded)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
    monkeypatch.setattr(safetensors.torch, "load_file", loaded)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0][:80] or "nothing")
def test_one_line(row, places, refused, no_weights, monkeypatch, tmp_path):
    from trl_diffusion.cli import training

    def here(args):
        monkeypatch.setattr(sys, "argv", [args.training_script, *args.training_script_args])
        import runpy

        runpy.run_path(args.training_script, run_name="__main__")

    datasets.disable_progress_bars()
    monkeypatch.setattr(training, "launch_command", here, raising=False)
    monkeypatch.chdir(tmp_path)
    line, *words = (part.format(**places) for part in row)
    message = refused(*shlex.split(line))
    for word in words:
        assert word in message
    assert "Errno" not in message
    assert not (places["root"] / "out").exists()


# ---- Other ends of a command ----------------------------------------------------------------------------------------


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv(DEBUG, "0")  # `--debug` sets it
    for argv in (["env", "--debug", "--nonsense"], ["--debug", "env", "--nonsense"], ["env", "--nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        error = capsys.readouterr().err
        assert "Traceback (most recent call last)" in error
        assert error.endswith("error: Found no option '--nonsense'; see `trl-diffusion env --help`\n")


def test_the_trainings_own_debug_option_is_left_alone(monkeypatch):
    monkeypatch.setenv(DEBUG, "0")
    seen = []
    monkeypatch.setattr("trl_diffusion.cli.env.run", seen.extend)
    main(["env", "--debug", "underflow_overflow"])
    assert seen == ["--debug", "underflow_overflow"]
    assert os.environ[DEBUG] == "0"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ValueError("two\n lines"), 2)])
def test_how_a_command_ends(error, code, capsys):
    with pytest.raises(SystemExit) as exit_, one_line_errors("trl-diffusion kto"):
        raise error
    assert exit_.value.code == code
    expected = {130: "trl-diffusion kto: interrupted\n", 2: "trl-diffusion kto: error: two lines\n"}
    assert capsys.readouterr().err == expected[code]


@pytest.mark.parametrize(
    "text",
    ["MLflowCallback requires mlflow to be installed. Run `pip install mlflow`.", "No GPU found. A GPU is needed."],
)
def test_what_a_machine_lacks_is_one_line(capsys, text):
    with pytest.raises(SystemExit, match="2"), one_line_errors("trl-diffusion kto"):
        raise RuntimeError(text)
    assert capsys.readouterr().err == f"trl-diffusion kto: error: {text}\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), one_line_errors("trl-diffusion kto"):
        raise KeyError("x")


def request_error(kind: type, url: str) -> Exception:
    request = httpx.Request("GET", url)
    return kind(f"404 Client Error for url: {url}.", response=httpx.Response(404, request=request))


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (request_error(RepositoryNotFoundError, "https://h/api/models/a/b"), "no such repository, or it is private"),
        (request_error(GatedRepoError, "https://h/a/b/resolve/main/x"), "access to it has to be requested"),
        (request_error(RevisionNotFoundError, "https://h/api/models/a/b/revision/x"), "no such revision"),
        (request_error(HfHubHTTPError, "https://h/api/datasets/a/b"), "the Hub answers with an error"),
        (LocalEntryNotFoundError("Cannot find https://h/a/b in the cache"), "the Hub cannot be reached"),
        (OfflineModeIsEnabled("Cannot reach https://h/api/models/a/b: offline mode"), "`HF_HUB_OFFLINE` is set"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_hub_is_one_sentence(cause, words):
    error = OSError("We could not connect to 'https://h'.\nSee https://h/docs/long for what to do.\n")
    error.__cause__ = cause
    message = one_line(error)
    assert message.startswith("Found no 'a/b' on this machine or on the Hub: ")
    assert words in message
    assert "See" not in message


def test_a_push_that_fails_looks_for_no_model():
    error = OfflineModeIsEnabled("Cannot reach https://h/api/repos/create: offline mode is enabled")
    assert one_line(error).startswith("The repository to push to cannot be created on the Hub: `HF_HUB_OFFLINE` is")
    assert one_line(request_error(HfHubHTTPError, "an address")).startswith("Found no such model on")


def test_a_sentence_of_ours_is_kept_whatever_caused_it():
    error = ValueError("Found x, expected y")
    error.__cause__ = OfflineModeIsEnabled("https://h/a/b")
    assert one_line(error) == "Found x, expected y"


def test_suggestions():
    assert suggestion("lerning_rate", ["beta", "learning_rate"]) == "; did you mean 'learning_rate'?"
    assert suggestion("zzz", ["beta", "learning_rate"]) == ""


@pytest.mark.slow
def test_in_a_process(tmp_path):
    """What a person sees: nothing of what libraries log on the way; and `| head` is quiet."""
    program = shlex.quote(str(Path(sys.executable).parent / "trl-diffusion"))
    for command, code in (
        (f"{program} generate --model_name_or_path some/one --prompts x --output_dir {tmp_path}/out", 2),
        (f"{program} env | true; exit ${{PIPESTATUS[0]}}", None),
    ):
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, cwd=tmp_path)
        if code is None:
            assert result.stderr == ""
            assert result.returncode in (0, 141)
        else:
            assert result.returncode == code
            (line,) = result.stderr.splitlines()
            assert line.startswith("trl-diffusion generate: error: Found no 'some/one' on this machine or on the Hub")
