"""Peak memory and time of segmenting a whole CT: a phantom of 512 x 512 x 300 voxels with 3 labels, 8 samples.

    .venv/bin/python benchmarks/memory.py

The weights of configs/ct.yaml are untrained: memory and time do not depend on them.
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
LABELS = {0: "background", 1: "organ", 2: "vessel", 3: "lesion"}
SPACING_MM = (0.8, 0.8, 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = folder / "ct.nii.gz"
        image, _ = draw_case(np.random.default_rng(0), tuple(options.shape), SPACING_MM, "ct")
        nib.save(nib.Nifti1Image(np.rint(image).astype(np.int16), np.diag([*SPACING_MM, 1])), scan)
        del image
        config = load_config(ROOT / "configs/ct.yaml")
        model = folder / "model.safetensors"
        weights = build(config, 1, len(LABELS)).state_dict()
        save_model(model, weights, Description(config, LABELS, ("CT",), {}, {}, {"steps": 0}))
        command = [sys.executable, "-m", "medseg_diff", "segment", str(scan), "--model", str(model)]
        command += ["--out", str(folder / "out"), "--samples", str(options.samples)]
        begun = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - begun
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    shape = " x ".join(map(str, options.shape))
    print(f"{shape}, {options.samples} samples: {seconds:.0f} s, peak memory {peak_gb:.2f} GiB")


if __name__ == "__main__":
    main()
