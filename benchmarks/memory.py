"""Peak memory and time of segmenting a whole CT: a phantom of 512 x 512 x 900 voxels with 5 labels, 16 samples.

    .venv/bin/python benchmarks/memory.py
    .venv/bin/python benchmarks/memory.py --slices 100

The weights of configs/ct.yaml are untrained: memory and time hardly depend on them. With `--save` for instance of
seg,prob,samples,report other files are written than by default.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from medseg_diff.checkpoint import Description, build, save_model
from medseg_diff.config_file import load_config
from medseg_diff.datasets.phantom import draw_case

ROOT = Path(__file__).resolve().parents[1]
LABELS = dict(enumerate(("background", "liver", "kidneys", "spleen", "aorta", "lesion")))
SPACING_MM = (0.8, 0.8, 1.5)
DRAWN = 20
"""Slices of the phantom, which is stacked on itself: to draw one is slow."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=900)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--save", default="seg,uncertainty,preview,report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = folder / "ct.nii.gz"
        image, _ = draw_case(np.random.default_rng(0), (512, 512, DRAWN), SPACING_MM, "ct")
        stack = np.tile(np.rint(image).astype(np.int16), -(-options.slices // DRAWN))[..., : options.slices]
        nib.save(nib.Nifti1Image(stack, np.diag([*SPACING_MM, 1])), scan)
        del image, stack
        config = load_config(ROOT / "configs/ct.yaml")
        model = folder / "model.safetensors"
        weights = build(config, 1, len(LABELS)).state_dict()
        save_model(model, weights, Description(config, LABELS, ("CT",), {}, {}, {"steps": 0}))
        command = [sys.executable, "-m", "medseg_diff", "segment", str(scan), "--model", str(model)]
        command += ["--out", str(folder / "out"), "--samples", str(options.samples), "--save", options.save]
        begun = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - begun
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    count = f"512 x 512 x {options.slices}, {len(LABELS) - 1} labels, {options.samples} samples"
    print(f"{count}: {seconds:.0f} s, {seconds / options.slices:.2f} s a slice, peak memory {peak_gb:.2f} GiB")


if __name__ == "__main__":
    main()
