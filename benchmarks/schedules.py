"""The noise schedules, with and without zero terminal SNR: docs/schedules.png.

.venv/bin/python benchmarks/schedules.py
"""

import argparse
from pathlib import Path

import torch

from medseg_diff.diffusion.schedule import KINDS, alpha_bar, log_snr
from medseg_diff.figures import Panel, draw_lines

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/schedules.png")
    options = parser.parse_args()
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    levels = [{kind: alpha_bar(kind, t, zero_terminal=zero) for kind in KINDS} for zero in (True, False)]
    shares = [{kind: (t.tolist(), level.tolist()) for kind, level in curves.items()} for curves in levels]
    within = t[1:-1]  # the log-SNR is infinite at the ends
    ratios = [
        {kind: (within.tolist(), log_snr(level[1:-1]).tolist()) for kind, level in curves.items()} for curves in levels
    ]
    time = "time $t$, from clean to noise"
    panels = [
        Panel("What is left of the signal", time, r"$\bar\alpha_t$", *shares),
        Panel("Signal against noise", time, r"$\log\,(\bar\alpha_t\,/\,(1 - \bar\alpha_t))$", *ratios, ylim=(-15, 10)),
    ]
    draw_lines(panels, options.out, solid="zero terminal SNR", dashed="as published")
    print(options.out)


if __name__ == "__main__":
    main()
