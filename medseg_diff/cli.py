"""The program: parses, calls one function, prints. Heavy imports stand inside the commands, so that --help is quick."""

import json
import logging
import os
import sys
import traceback
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg_diff import __version__
from medseg_diff.errors import UserError, reason
from medseg_diff.options import (
    DeviceOption,
    Fuse,
    FuseOption,
    JsonOption,
    Modality,
    ModelOption,
    SamplerOption,
    SamplesOption,
    SeedOption,
    Split,
    StepsOption,
)

app = typer.Typer(
    name="medseg-diff",
    help="Medical image segmentation by denoising diffusion: many plausible masks, one honest answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Runs the program: exit code 0 all done, 1 some scans were refused, 2 something given is wrong."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    _hush()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        from medseg_diff.console import say

        if isinstance(error, UserError):
            say(f"error: {error}")
        elif isinstance(error, OSError) and error.filename is not None:
            say(f"error: {error.filename}: {error.strerror}. Choose a place that can be read and written to.")
        else:
            say(f"error: {reason(error)}. This is not meant to happen: --debug shows where; please report it.")
        sys.exit(2)


def _show_version(wanted: bool | None) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback(help=app.info.help)
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, with any command.")] = False,
    version: Annotated[
        bool | None, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = None,
) -> None:
    """Options before the command."""


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo")) -> None:
    """Make a phantom data set, train on it, segment an unseen scan, evaluate, generate: the whole program."""
    from medseg_diff.demo import run_demo

    print(run_demo(out))


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="A YAML file, such as configs/quickstart.yaml.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override; repeatable.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; by default that of the configuration.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what the run has, and start again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the configuration.")] = False,
    device: DeviceOption = None,
) -> None:
    """Train into runs/NAME; the same command again goes on where it stopped."""
    from medseg_diff.config_file import load_config

    loaded = load_config(config, set_ or [])
    folder = run_folder(config.stem if name is None else name)
    from medseg_diff.device import choose_device
    from medseg_diff.train import rehearse
    from medseg_diff.train import train as run

    if dry_run:
        print(rehearse(loaded, folder, choose_device(device)), end="")
        return
    summary = run(loaded, folder, choose_device(device), fresh=fresh)
    for key in ("val/dice", "val/loss"):
        if key in summary:
            print(f"{key} {summary[key]:.4f}")
    print(f"model {folder / 'best.safetensors'}, beside it config.yaml, metrics.csv and pictures")


@app.command()
def segment(
    scans: Annotated[list[Path], typer.Argument(metavar="SCAN...", help="Files, DICOM series or folders of scans.")],
    model: ModelOption = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("segmentations"),
    samples: SamplesOption = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    fuse: FuseOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    save: Annotated[
        str, typer.Option(help="From seg,labels,prob,uncertainty,samples,preview,report,dicom-seg,rtstruct,seg-nrrd.")
    ] = "seg,uncertainty,preview,report",
    series: Annotated[
        str | None, typer.Option(help="Number or UID of the DICOM series, of a folder with several.")
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="What the scans' channels are; refused where the model's differ."),
    ] = None,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave scans that have a report of the same model and settings.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Segment scans: masks and uncertainty on each scan's own grid, a preview, a report."""
    loaded = _load(model, device, "segment", sampler, fuse)
    _agree(channels, ",".join(loaded.about.channels))
    from medseg_diff.segment import segment_files

    items = [item.strip() for item in save.split(",") if item.strip()]
    reports, refused = segment_files(
        scans, loaded, out,
        samples=samples, steps=steps, seed=seed, items=items, series=series, skip_existing=skip_existing,
    )  # fmt: skip
    if as_json:
        print(json.dumps({"reports": reports, "refused": [vars(error) for error in refused]}, indent=2))
    else:
        for report in reports:
            volumes = ", ".join(f"{label['name']} {label['volume_ml']:.2f} ml" for label in report["labels"])
            print(f"{report['scan']}: {volumes}")
        print(f"{len(reports)} of {len(reports) + len(refused)} scans segmented into {out}")
        for error in refused:
            print(f"refused: {error.where}: {error.what}")
    if refused:
        raise typer.Exit(1 if reports else 2)


@app.command()
def evaluate(
    model: ModelOption = None,
    data: Annotated[Path | None, typer.Option(help="A data set, for --model.")] = None,
    split: Annotated[Split, typer.Option(help="Which cases: by the model's own split.")] = Split.val,
    predictions: Annotated[Path | None, typer.Option(help="Folder of label maps, instead of a model.")] = None,
    references: Annotated[Path | None, typer.Option(help="Folder of references, for --predictions.")] = None,
    generated: Annotated[Path | None, typer.Option(help="Folder of generated images, instead of a model.")] = None,
    reference: Annotated[Path | None, typer.Option(help="The data set to hold them against.")] = None,
    out: Annotated[Path, typer.Option(help="Where summary.json, cases.csv and pictures go.")] = Path("evaluation"),
    samples: SamplesOption = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    fuse: FuseOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    uri: Annotated[str | None, typer.Option(help="Tracking store; by default mlflow.db here.")] = None,
) -> None:
    """Score a model on a data set, label maps against references, or generated images against a data set."""
    if generated is not None or reference is not None:
        others = (model, data, predictions, references, samples, steps, sampler, fuse, device)
        if generated is None or reference is None or any(given is not None for given in others):
            advice = "Give --generated and --reference, and besides only --out, --seed and --uri."
            raise UserError("evaluate", "the options do not fit together", advice)
        from medseg_diff.realism.report import evaluate_generated
        from medseg_diff.realism.report import table as realism_table

        print(realism_table(evaluate_generated(generated, reference, out, seed=seed, uri=uri)))
        print(f"written to {out / 'summary.json'} and {out / 'nearest.png'}")
        return
    if (predictions is None) != (references is None) or (predictions is not None and data is not None):
        advice = "Give --model and --data, or --predictions and --references."
        raise UserError("evaluate", "the options do not fit together", advice)
    if predictions is None and data is None:
        raise UserError("evaluate", "nothing to evaluate", "Give --data ROOT, or --predictions and --references.")
    loaded = None if predictions else _load(model, device, "segment", sampler, fuse)
    from medseg_diff.evaluate import run_evaluation
    from medseg_diff.metrics import table

    sources: Any = (predictions, references) if loaded is None else (data, split.value)
    summary = run_evaluation(loaded, sources, out, samples=samples, steps=steps, seed=seed, uri=uri)
    print(table(summary))
    print(f"written to {out}: summary.json, cases.csv" + (", preview.png, reliability.png" if loaded else ""))


@app.command()
def generate(
    model: ModelOption = None,
    count: Annotated[int, typer.Option(min=1, max=100_000, help="Number of images.")] = 16,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Where the images go.")] = Path("generated"),
    show_process: Annotated[bool, typer.Option("--show-process", help="Add process.png and process.gif.")] = False,
    device: DeviceOption = None,
) -> None:
    """Draw images from noise: grid.png and one NIfTI file an image, with its mask where the model makes pairs."""
    loaded = _load(model, device, "generate", sampler)
    from medseg_diff.generate import generate_files

    paths = generate_files(loaded, out, count, steps=steps, seed=seed, show_process=show_process)
    print(f"{count} images and {paths[0]}")


@app.command()
def diffusion(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or TIFF image, or a scan.")],
    size: Annotated[int, typer.Option(min=16, max=256, help="Side of the square it is fitted into.")] = 128,
    schedule: Annotated[str, typer.Option(help="linear, quadratic, cosine, sigmoid or scaled_linear.")] = "cosine",
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Steps from the image to noise.")] = 1000,
    shown: Annotated[int, typer.Option(min=2, max=16, help="Columns of the figures.")] = 8,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("diffusion"),
) -> None:
    """Show the forward and the reverse process on one image, without a network: its perfect denoiser is known."""
    from medseg_diff.strip import draw_diffusion

    paths, difference = draw_diffusion(image, out, size=size, schedule=schedule, steps=steps, shown=shown, seed=seed)
    print(*paths, sep="\n")
    print(f"largest difference between the forward chain and the closed form: {difference:.1e}")


@app.command()
def compare(
    experiment: Annotated[str | None, typer.Option(help="Only runs of this experiment.")] = None,
    metric: Annotated[str, typer.Option(help="Sorts the runs, best first.")] = "val/dice",
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    uri: Annotated[str | None, typer.Option(help="Tracking store; by default mlflow.db here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show MLflow runs side by side: the parameters that differ, and the metrics."""
    from medseg_diff.compare import compare as rows_of
    from medseg_diff.compare import render
    from medseg_diff.config import Tracking

    store = uri or os.environ.get("MLFLOW_TRACKING_URI") or Tracking().uri
    rows = rows_of(store, experiment, metric, top)
    print(json.dumps(rows, indent=2) if as_json else render(rows, store, metric))


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A data set or a scan.")],
    config: Annotated[
        Path | None, typer.Option("--write-config", metavar="FILE", help="Write a configuration to train on it.")
    ] = None,
) -> None:
    """Name every problem of a data set or a scan at once, and what to do about each; then what the set holds."""
    from medseg_diff.datasets.check import check as inspect
    from medseg_diff.datasets.check import write_config

    problems, contents = inspect(path)
    for problem in problems:
        print(f"{problem.level}: {problem.where}: {problem.what}. {problem.advice}")
    errors = sum(problem.level == "error" for problem in problems)
    print(f"{path}: {errors} errors, {len(problems) - errors} warnings")
    if contents:
        from medseg_diff.console import outline

        print(outline(contents))
    if config:
        write_config(contents, config)
        print(f"written: {config}; medseg-diff train --config {config}")
    if errors:
        raise typer.Exit(2)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As of --model; else the newest run.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model file is: labels, preprocessing, scores, data, version."""
    from medseg_diff.checkpoint import explain, find_model
    from medseg_diff.console import outline

    about = explain(find_model(model, "segment")[0])
    print(json.dumps(about, indent=2) if as_json else outline(about))


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    cases: Annotated[int, typer.Option(min=2, help="Number of cases.")] = 20,
    modality: Annotated[Modality, typer.Option(help="What the scans look like.")] = Modality.ct,
    raters: Annotated[int, typer.Option(min=1, max=16, help="Label maps a case.")] = 1,
    seed: SeedOption = 0,
    ambiguous: Annotated[
        bool, typer.Option("--ambiguous", help="Raters disagree by a known law, kept under truth/.")
    ] = False,
) -> None:
    """Make a synthetic labelled data set in the Decathlon layout."""
    if ambiguous:
        from medseg_diff.datasets.ambiguous_phantom import make_ambiguous_phantom as make
    else:
        from medseg_diff.datasets.phantom import make_phantom as make

    make(folder, cases, modality.value, raters, seed)
    print(f"{cases} cases in {folder}")


def _hush() -> None:
    """MONAI talks of optional readers and of its own deprecations."""
    warnings.filterwarnings("ignore", module="monai")
    logging.getLogger("monai").setLevel(logging.ERROR)


def run_folder(name: str) -> Path:
    """runs/NAME. Raises UserError for a name that would lead elsewhere."""
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(f"--name {name!r}", "is no plain name", "Use letters, digits, - and _.")
    return Path("runs") / name


def _agree(given: str | None, known: str) -> None:
    """Channels in a wrong order would be segmented without a sign of it. Raises UserError."""
    if given is None and "," in known:
        from medseg_diff.console import say

        say(f"warning: channels are taken as {known}, in this order; --channels makes sure of it")
    if given not in (None, known):
        what = f"the model's channels are {known}"
        raise UserError(f"--channels {given}", what, "Store the scan's channels in that order, or use another model.")


def _load(given: str | None, device: str | None, task: str, sampler: StrEnum | None, fuse: Fuse | None = None) -> Any:
    from medseg_diff.checkpoint import find_model

    path, where = find_model(given, task)
    from medseg_diff.api import open_model
    from medseg_diff.console import say

    model = open_model(path, task, device, sampler=sampler and sampler.value, fuse=fuse and fuse.value)
    say(f"model: {path} ({where})")
    if model.about.config.use:
        say(f"warning: the model is {model.about.config.use}")
    return model
