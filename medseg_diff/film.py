"""A process, from noise to clean or back: as a figure, and as an animated GIF."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from medseg_diff.figures import save_figure
from medseg_diff.files import replacing

COLORS = 24
"""Of a GIF, and as many grays: noise does not compress, and more would make files much larger."""

FRAMES = 31
"""The most that a film of a process shows, for files of about a megabyte."""

Pictures = Float[np.ndarray, "images rows columns *rgb"]
State = tuple[str, Mapping[str, Pictures]]
"""A moment of a process: its caption, and by name (x_t, the estimate of x_0) its pictures, one an image.

Captions and names may hold mathematics between dollars. Pictures are gray, or coloured with values in [0, 1].
"""


def draw_process(
    states: Sequence[State],
    path: Path,
    *,
    shown: int = 8,
    title: str = "",
    limits: tuple[float, float] = (-1.0, 1.0),
    aspect: float = 1.0,
) -> None:
    """A column for each of `shown` states, evenly chosen from first to last; the rows of one image below another's.

    limits are the values shown black and white; aspect is the height of a pixel over its width.
    """
    chosen = _evenly(states, shown)
    names = list(chosen[0][1])
    count = len(chosen[0][1][names[0]])
    rows = [[pictures[name][image] for _, pictures in chosen] for image in range(count) for name in names]
    captions = [caption for caption, _ in chosen]
    tall, wide = rows[0][0].shape[:2]
    title = textwrap.fill(title, int(24 * len(chosen) * min(1, wide / tall / aspect) ** 0.5))
    save_figure(_tiles(rows, names * count, captions, title, limits, aspect, 200), path)


def draw_film(
    states: Sequence[State],
    path: Path,
    *,
    limits: tuple[float, float] = (-1.0, 1.0),
    aspect: float = 1.0,
    seconds: float = 5.0,
) -> None:
    """The states as an animated GIF, at most FRAMES of them, evenly chosen; a row an image, a column a name.

    limits and aspect are those of `draw_process`; `seconds` is that of `draw_gif`. Lines of a caption are
    joined by commas, and names broken there.
    """
    frames = []
    for caption, pictures in _evenly(states, FRAMES):
        rows = [list(row) for row in zip(*pictures.values(), strict=True)]
        names = [name.replace(", ", "\n") for name in pictures]
        figure = _tiles(rows, [""] * len(rows), names, caption.replace("\n", ", "), limits, aspect, 256)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    draw_gif(frames, path, seconds=seconds)


def draw_gif(frames: Sequence[UInt8[np.ndarray, "rows columns 3"]], path: Path, *, seconds: float) -> None:
    """An animated GIF of `seconds` that begins again for ever; its last frame is held two seconds longer."""
    palette = _palette(np.concatenate(frames))
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations_ms = np.full(len(frames), round(1000 * seconds / len(frames)))
    durations_ms[-1] += 2000
    with replacing(path) as temporary:
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=durations_ms.tolist(), loop=0)


def _palette(pixels: UInt8[np.ndarray, "rows columns 3"]) -> Image.Image:
    """Grays are chosen apart from colours, or a few colours would tint them all."""
    coloured = np.ptp(pixels, axis=-1) > 0
    parts = [Image.fromarray(pixels[chosen][None]) for chosen in (coloured, ~coloured) if chosen.any()]
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for part in parts for value in (part.quantize(COLORS).getpalette() or [])[: 3 * COLORS]])
    return palette


def _evenly(states: Sequence[State], count: int) -> list[State]:
    """At most `count` of the states, the first and the last among them."""
    return [states[round(index)] for index in np.linspace(0, len(states) - 1, min(count, len(states)))]


def _tiles(
    rows: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    captions: Sequence[str],
    title: str,
    limits: tuple[float, float],
    aspect: float,
    pixels: int,
) -> Figure:
    """Pictures in rows, each row named at its left and each column captioned above, about `pixels` squared in size.

    Every pixel of a picture covers the same number of the figure's, so that noise looks like noise.
    """
    tall, wide = rows[0][0].shape[0] * aspect, rows[0][0].shape[1]
    scale = max(1, round(pixels / (tall * wide) ** 0.5))
    width, height = scale * wide, max(1, round(scale * tall))
    gap, line = 6, max(22, width // 9)
    size = 0.48 * line
    left = gap + line * any(names)
    top = gap + line * (_lines(title) + max(map(_lines, captions)))
    total = left + len(captions) * (width + gap), top + len(rows) * (height + gap)
    figure = Figure((total[0] / 100, total[1] / 100), 100, facecolor="white")
    canvas = np.full((total[1], total[0], 3), 255, np.uint8)
    for row, (name, pictures) in enumerate(zip(names, rows, strict=True)):
        y = top + row * (height + gap)
        x = left - gap / 2 - line / 2
        figure.text(
            x / total[0], 1 - (y + height / 2) / total[1], name, rotation=90, va="center", ha="center", size=size
        )
        for column, picture in enumerate(pictures):
            x = left + column * (width + gap)
            gray = picture.ndim == 2
            values = (picture[..., None] - limits[0]) / (limits[1] - limits[0] or 1.0) if gray else picture
            pixel = Image.fromarray(np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8).repeat(3 if gray else 1, 2))
            canvas[y : y + height, x : x + width] = pixel.resize((width, height), Image.Resampling.NEAREST)
    figure.figimage(canvas)
    for column, caption in enumerate(captions):
        x = left + column * (width + gap) + width / 2
        figure.text(x / total[0], 1 - (top - gap) / total[1], caption, va="bottom", ha="center", size=size)
    figure.text(0.5, 1 - gap / total[1], title, va="top", ha="center", size=size)
    return figure


def _lines(text: str) -> int:
    return len(text.splitlines())
