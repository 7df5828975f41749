"""What diffusion does to an image, without a network: `medseg-diff diffusion`."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from medseg_diff.diffusion.process import add_noise, equivalent_noise, forward_chain
from medseg_diff.diffusion.sampler import ancestral_step
from medseg_diff.diffusion.schedule import KINDS, betas, levels
from medseg_diff.errors import UserError, reason
from medseg_diff.film import FRAMES, State, draw_film, draw_process
from medseg_diff.scans.preview import choose_view
from medseg_diff.scans.read import KINDS as SCANS
from medseg_diff.scans.read import read_scan

X_T, CHAIN, CLOSED = "$x_t$", "$x_t$ step by step", "$x_t$ in closed form"
SIGNAL, NOISE = r"its image, $\sqrt{\bar\alpha_t}\;x_0$", r"its noise, $\sqrt{1 - \bar\alpha_t}\;\epsilon$"


def draw_diffusion(
    image: Path, out: Path, *, size: int, schedule: str, steps: int, shown: int, seed: int
) -> tuple[list[Path], float]:
    """Writes forward.png, forward.gif, reverse.png and reverse.gif, the figures with `shown` columns.

    Returns their paths, and the largest difference between the forward chain and the closed form. Raises UserError.
    """
    if schedule not in KINDS:
        raise UserError(f"--schedule {schedule}", "there is no such schedule", f"Choose from {', '.join(KINDS)}.")
    if shown > steps:
        raise UserError(f"--shown {shown}", f"the process has only {steps} steps", "Show fewer, or take more --steps.")
    x_0 = torch.from_numpy(read_picture(image, size) / 127.5 - 1)[None]
    path = levels(schedule, steps)
    alpha_bars = path.flip(0)
    between = (FRAMES - 1) // (shown - 1)  # frames of the film from one column of the figure to the next
    times = np.unique(np.linspace(0, steps, (shown - 1) * between + 1).round().astype(int)).tolist()
    generator = torch.Generator().manual_seed(seed)
    written = [out / name for name in ("forward.png", "forward.gif", "reverse.png", "reverse.gif")]

    states, difference = [], 0.0
    for t, (chain, closed) in zip(times, forward(x_0, alpha_bars, times, generator), strict=True):
        difference = max(difference, float((chain - closed).abs().max()))
        states.append(_state(t, alpha_bars[t], {CHAIN: chain, CLOSED: closed}))
    title = f"Forward process, {schedule} schedule, {steps} steps. "
    title += f"Step by step, and at once with the noises merged into one: they differ by at most {difference:.0e}."
    draw_process(states, written[0], shown=shown, title=title)
    draw_film([(caption, {X_T: rows[CHAIN]}) for caption, rows in states], written[1])

    states = []
    for t, x_t in zip(range(steps, -1, -1), reverse(x_0, path, generator), strict=True):
        if t in times:
            signal = alpha_bars[t].sqrt() * x_0
            states.append(_state(t, alpha_bars[t], {X_T: x_t, SIGNAL: signal, NOISE: x_t - signal}))
    title = f"Reverse process, {schedule} schedule, {steps} steps of the ancestral sampler. "
    title += "No network: the perfect denoiser of a data set that holds this one image always answers with it."
    draw_process(states, written[2], shown=shown, title=title)
    draw_film([(caption, {name: rows[name] for name in (X_T, SIGNAL)}) for caption, rows in states], written[3])
    return written, difference


def forward(
    x_0: Float64[Tensor, "1 side side"],
    alpha_bars: Float64[Tensor, "levels"],
    times: Sequence[int],
    generator: torch.Generator,
) -> Iterator[tuple[Float64[Tensor, "1 side side"], Float64[Tensor, "1 side side"]]]:
    """x_t at each of the rising times 0 ... T: by the chain, and by the closed form with the chain's noises as one.

    alpha_bars are those of t = 0 ... T. The noises are merged from time to time, so that not all are held at once.
    """
    yield x_0, x_0
    variances = betas(alpha_bars[1:])
    x_t, merged = x_0, torch.zeros_like(x_0)
    for earlier, t in pairwise(times):
        chain, noises = forward_chain(x_t, variances[earlier:t], generator)
        x_t = chain[-1]
        noise = equivalent_noise(noises, variances[earlier:t])[-1]
        merged = add_noise(merged, noise, alpha_bars[t] / alpha_bars[earlier])
        yield x_t, add_noise(x_0, merged / (1 - alpha_bars[t]).sqrt(), alpha_bars[t])


def reverse(
    x_0: Float64[Tensor, "1 side side"], path: Float64[Tensor, "levels"], generator: torch.Generator
) -> Iterator[Float64[Tensor, "1 side side"]]:
    """x at every level of the path from pure noise to clean: draws of q(x_s | x_t, x_0), where x_0 is known."""

    def noise() -> Tensor:
        return torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)

    x_t = noise()
    yield x_t
    for alpha_bar_t, alpha_bar_s in pairwise(path):
        x_t = ancestral_step(x_t, x_0, alpha_bar_t, alpha_bar_s, noise())
        yield x_t


def read_picture(path: Path, size: int) -> UInt8[np.ndarray, "{size} {size}"]:
    """A PNG, JPEG or TIFF in gray, or a scan's middle slice, in a square: its proportions are kept, black beside it.

    Intensities beyond 8 bits are stretched from their 0.5 and 99.5 percentiles to 0 ... 255. Raises UserError.
    """
    scan = path.is_dir() or path.name.lower().endswith(
        tuple(suffix for suffix, kind in SCANS.items() if kind not in ("png", "tiff"))
    )
    picture, aspect = _middle_slice(path) if scan else (_photograph(path), 1.0)
    width, height = picture.width, picture.height * aspect
    scale = size / max(width, height)
    resized = picture.resize((max(1, round(scale * width)), max(1, round(scale * height))), Image.Resampling.LANCZOS)
    return np.array(ImageOps.pad(resized, (size, size)))


def _middle_slice(path: Path) -> tuple[Image.Image, float]:
    """Also the height of its pixels over their width."""
    scan = read_scan(path)
    view = choose_view(np.zeros(scan.shape, np.uint8), None, scan.affine)
    width_mm, height_mm = view.pixel_mm
    return _stretched(view.cut(scan.array[0], view.count // 2)), height_mm / width_mm


def _photograph(path: Path) -> Image.Image:
    if not path.is_file():
        raise UserError(path, "there is no such file", "Check the path.")
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as file:
                upright = ImageOps.exif_transpose(file)
        return _stretched(np.asarray(upright)) if upright.mode[0] in "IF" else upright.convert("L")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise UserError(path, "it has too many pixels", "Give a smaller image.") from error
    except Exception as error:  # decoders raise almost anything
        advice = "Give a PNG, JPEG or TIFF image, or a scan as `segment` reads it."
        raise UserError(path, f"it is no image that can be read ({reason(error)})", advice) from error


def _stretched(values: np.ndarray) -> Image.Image:
    values = np.nan_to_num(values.astype(np.float64))
    low, high = np.percentile(values, (0.5, 99.5))
    return Image.fromarray((255 * np.clip((values - low) / max(high - low, 1e-12), 0, 1)).round().astype(np.uint8))


def _state(t: int, alpha_bar: Tensor, pictures: dict[str, Tensor]) -> State:
    caption = f"$t = {t}$\n$\\bar\\alpha_t = {float(alpha_bar):.3f}$"
    return caption, {name: picture.numpy() for name, picture in pictures.items()}
