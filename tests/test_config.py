from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from medseg_diff.config import Config, flatten, plain
from medseg_diff.config_file import load_config, parse_config
from medseg_diff.diffusion.schedule import levels
from medseg_diff.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SMALL = "data: {root: d, size: [32, 32, 16]}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *settings: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(write(folder, text), settings)
    assert caught.value.where.endswith("mine.yaml") or caught.value.where == f"--set {settings[-1]}"
    assert len(str(caught.value)) < 2000
    return caught.value.what


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_survive_a_file(path: Path, tmp_path: Path):
    config = load_config(path)
    again = write(tmp_path, yaml.safe_dump(plain(config)))
    assert load_config(again) == config


def test_settings_lie_over_the_file_in_their_order(tmp_path: Path):
    path = write(tmp_path, SMALL + "train: {steps: 5}\n")
    settings = ["train.steps=7", "train.lr=1e-4", "data.spacing_mm=[1, 1, 2.5]", "train.steps=8", "tracking.uri=a=b"]
    config = load_config(path, settings)
    assert (config.train.steps, config.train.lr) == (8, 1e-4)
    assert config.data.spacing_mm == (1, 1, 2.5)
    assert config.tracking.uri == "a=b"
    assert load_config(path, ["train.max_minutes=null"]).train.max_minutes is None
    assert load_config(path).train.steps == 5


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("train.steps", "is not KEY=VALUE"),
        ("=5", "is not KEY=VALUE"),
        ("seed.deep=1", "seed is no section"),
        ("train.steps=[1", "the value is no YAML"),
        ("train.steps=!!python/name:os.system", "the value is no YAML"),
        (f"seed={'1' * 5000}", "the value is no YAML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, setting: str, what: str):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, SMALL + "seed: 1\n"), [setting])
    assert caught.value.where == f"--set {setting}"
    assert caught.value.what == what


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("train.stesp=5", "train.stesp: unknown key, did you mean train.steps?"),
        ("trian.steps=5", "trian: unknown key, did you mean train?"),
        ("batchsize=5", "batchsize: unknown key, did you mean train.batch_size?"),
        ("lr=5", "lr: unknown key, did you mean train.lr?"),
        ("steps=5", "steps: unknown key, did you mean train.steps or segment.steps?"),
        ("tracking.zzz=5", "tracking.zzz: unknown key (there are tracking.uri, tracking.experiment)"),
        ("train.lr=.nan", "train.lr: Input should be a finite number (it is nan)"),
        ("train.lr=nan", "train.lr: Input should be a finite number (it is 'nan')"),
        ("train.lr=.inf", "train.lr: Input should be a finite number (it is inf)"),
        ("train.ema=.nan", "train.ema: Input should be less than 1 (it is nan)"),
        ("train.steps=-1", "train.steps: Input should be greater than or equal to 1 (it is -1)"),
        ("data.fold=5", "data.fold: 5 is not below data.folds, 5"),
        ("data.size=[32, 32]", "data.size: 3 numbers are needed for data.spatial_dims 3"),
        ("data.size.0=32", "size is no section"),
        ("data.size=[32, 32, 20]", "data.size.2: Input should be a multiple of 16 (it is 20)"),
        ("data.window_hu=[5, 5]", "data.window_hu: the first number must be below the second"),
        ("data.percentiles=[50, 50]", "data.percentiles.0: Input should be less than 50 (it is 50)"),
        ("data.spacing_mm=[1, 1]", "data.spacing_mm.2: Field required"),
        ("network.widths=[8, 16]", "network.widths: Tuple should have at least 4 items"),
        ("network.kind=unconditional", "network.kind: unconditional does not serve task segment"),
        ("task=generate", "network.kind: conditional does not serve task generate"),
        ("data.pairs=true", "data.pairs: pairs are generated"),
        ("diffusion.variance=learned", "diffusion.variance: learned needs task generate"),
        (
            "segment.sampler=euler",
            "segment.sampler: Input should be 'auto', 'ddpm', 'ddim', 'dpm++', 'dpm++sde' or 'heun'",
        ),
        ("train=5", "train: Input should be a valid dictionary"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, setting: str, what: str):
    assert refusal(tmp_path, SMALL, setting).startswith(what)


GENERATING = "task: generate\nnetwork: {kind: unconditional}\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("network: {kind: medsegdiff_v2}\ndiffusion: {prediction: noise}\n", "diffusion.prediction: at pure noise"),
        (
            "network: {kind: medsegdiff_v2}\ndiffusion: {prediction: noise, zero_terminal: false}\n",
            "diffusion.prediction: at pure noise",
        ),
        (GENERATING + "segment: {limit: clip}\n", "segment.limit: the range of"),
        ("network: {kind: classic_unet, padding: valid}\ntask: generate\n", "network.padding: valid is for"),
        (
            GENERATING + "diffusion: {variance: learned}\nsegment: {sampler: heun}\n",
            "diffusion.variance: learned is for segment.sampler ddpm",
        ),
        ("segment: {spacing: leading}\n", "segment.spacing: leading does not begin"),
        ("segment: {sampler: heun}\n", "segment.sampler: heun builds on estimates"),
        ("diffusion: {variance: large}\n", "diffusion.variance: conditional draws masks"),
        ("diffusion: {schedule: linear, zero_terminal: false}\n", "diffusion.zero_terminal: conditional draws"),
        (
            "network: {kind: classic_unet}\ndiffusion: {weighting: min_snr, pure_noise: 0.5}\n",
            "diffusion.weighting: min_snr teaches nothing",
        ),
    ],
)
def test_settings_that_do_not_fit_together(tmp_path: Path, text: str, what: str):
    assert refusal(tmp_path, SMALL + text).startswith(what)


@pytest.mark.parametrize("schedule", ["linear", "quadratic", "cosine", "sigmoid", "scaled_linear"])
def test_noise_may_be_predicted_where_the_schedule_does_not_end_in_it(tmp_path: Path, schedule: str):
    text = SMALL + "network: {kind: medsegdiff_v1}\n"
    text += f"diffusion: {{prediction: noise, zero_terminal: false, schedule: {schedule}}}\n"
    if levels(schedule, 4, zero_terminal=False)[0] == 0:
        assert refusal(tmp_path, text).startswith("diffusion.prediction")
    else:
        assert load_config(write(tmp_path, text)).diffusion.prediction == "noise"


def test_steps_and_pure_noise_follow_the_kind(tmp_path: Path):
    other = "network: {kind: classic_unet}\n"
    told = other + "segment: {steps: 3}\ndiffusion: {pure_noise: 0.1}\n"
    for text, steps, pure_noise in (("", 1, 0.5), (other, 32, 0.0), (told, 3, 0.1)):
        config = load_config(write(tmp_path, SMALL + text))
        assert (config.segment.steps, config.diffusion.pure_noise) == (steps, pure_noise)


def test_every_wrong_key_is_named_at_once(tmp_path: Path):
    what = refusal(tmp_path, "data: {root: d}\ntrain: {lr: x, steps: 0}\nnetwrok: {}\n")
    for key in ("data.size: Field required", "train.lr", "train.steps", "netwrok: unknown key, did you mean network"):
        assert key in what


@pytest.mark.parametrize(
    "text",
    [
        "data: !!python/object/apply:os.system ['touch pwned']\n",
        "data: [1\n",
        "",
        "- 1\n",
        "a: 2024-13-45\n",
        "[" * 3000,
        "{1: 2}\n",
        "data: {1: 2}\n",
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    refusal(tmp_path, text)
    assert not (tmp_path / "pwned").exists()


def test_a_small_file_that_unfolds_without_end_is_refused_in_one_line(tmp_path: Path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    refusal(tmp_path, "\n".join([*levels, "train: {lr: *a11}", SMALL]))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(UserError, match="Name a readable YAML file"):
            load_config(path)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"data: \xff\n")
    with pytest.raises(UserError, match=r"latin\.yaml: UnicodeDecodeError"):
        load_config(path)


@pytest.mark.parametrize("content", [None, 5, [], "text"])
def test_no_mapping_is_no_configuration(content: Any):
    with pytest.raises(UserError, match="here"):
        parse_config(content, "here")


def test_a_configuration_is_frozen_and_documents_every_key():
    config = parse_config({"data": {"root": "d", "size": [32, 32, 16]}}, "here")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    models: list[type[BaseModel]] = [Config]
    for model in models:
        for name, field in model.model_fields.items():
            kind: Any = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                models.append(kind)
            else:
                assert field.description, f"{model.__name__}.{name} has no docstring"
    assert len(models) == 7


def test_flatten_gives_dotted_names():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
