"""What the program, nibabel, MONAI and SimpleITK do with the same bad inputs: writes docs/bad-inputs.md.

Each input is made and read in a process of its own, with limits of time and memory, by all four in one run.
"""

import contextlib
import io
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import monai.transforms
import nibabel as nib
import numpy as np
import SimpleITK as sitk

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from bad_inputs import CASES  # noqa: E402
from bad_inputs.case import MOST_KB, MOST_S, Case, Volume  # noqa: E402

import medseg_diff.segment  # noqa: E402
import medseg_diff.train  # noqa: E402, F401  here, as every child would spend seconds on it

LIMIT_S, LIMIT_BYTES = 30, 12 * 2**30  # seconds of the processor; what only waits is given up after four times that
PAGE = ROOT / "docs/bad-inputs.md"
RIGHT, WRONG, CRASH = "right", "silently wrong", "crash or hang"
NOT_ASKED = "-"

HEAD = """# Bad inputs

Made by `.venv/bin/python benchmarks/bad_inputs.py`, from the cases that the tests run (`tests/bad_inputs`), in one run.

{totals}

What must happen is asked of the program in full: exit code, message, warning, time, memory, and what is left on the
disk. A peer is asked for less: an input that must be refused is right when reading raises an error, within {seconds:g}
seconds of the processor and 1 GB; any other is right when values and affine are those in the file, with or without
a warning. It is silently wrong when something else is read, and a crash or hang when a readable file raises an error,
or time ({limit} s) or memory run out. `-` is not a peer's: labels, models, configurations, and DICOM for nibabel.
A number with several inputs counts once, by the worst of them. Versions: nibabel {nib}, MONAI {monai},
SimpleITK {sitk}.

| | input | what must happen | medseg-diff | nibabel | MONAI | SimpleITK |
|---|---|---|---|---|---|---|
"""


def with_nibabel(path: Path) -> Volume:
    image = nib.load(path)
    return Volume(np.asarray(image.dataobj), image.affine)


def with_monai(path: Path) -> Volume:
    image = monai.transforms.LoadImage()(path)
    return Volume(image.numpy(), image.affine.numpy())


def with_sitk(path: Path) -> Volume:
    if path.is_dir():
        image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)))
    else:
        image = sitk.ReadImage(path)
    n = image.GetDimension()
    affine = np.eye(n + 1)
    affine[:n, :n] = np.array(image.GetDirection()).reshape(n, n) * image.GetSpacing()
    affine[:n, n] = image.GetOrigin()
    spatial = [0, 1, 2, n] if n > 2 else [0, 1, 2]
    flip = np.diag([-1.0, -1.0, *np.ones(len(spatial) - 2)])
    return Volume(sitk.GetArrayFromImage(image).T, flip @ affine[np.ix_(spatial, spatial)])


PEERS: dict[str, Callable[[Path], Volume]] = {"nibabel": with_nibabel, "MONAI": with_monai, "SimpleITK": with_sitk}


def peer(case: Case, read: Callable[[Path], Volume]) -> str:
    """The class of what a peer does, in this process."""
    assert case.make is not None
    Path("given").mkdir()
    path = case.make(Path("given"))
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = read(path)
    except MemoryError:
        return CRASH
    except Exception:
        spent_s = time.process_time() - begin
        spent_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return RIGHT if case.seen is None and spent_s < MOST_S and spent_kb < MOST_KB else CRASH
    return RIGHT if case.seen is not None and equal(found, case.seen) else WRONG


def equal(found: Volume, seen: Volume) -> bool:
    """The same values, but for frames and axes of length 1, at the same place."""
    values, wanted = found.values.squeeze(), seen.values.squeeze()
    if values.shape != wanted.shape or not np.allclose(found.affine, seen.affine, rtol=1e-4, atol=1e-3):
        return False
    return all(np.allclose(a, b, rtol=1e-5, equal_nan=True) for a, b in zip(values, wanted, strict=True))


def ours(case: Case) -> str:
    """Right where the test's check passes."""
    try:
        case.check(Path.cwd())
    except Exception as error:
        print(f"{case.number}: {case.what}: {type(error).__name__}: {error}", file=sys.__stderr__)
        return WRONG
    return RIGHT


def alone(task: Callable[[], str], limited: bool) -> str:
    """The answer of a child in an empty folder; crash or hang where none comes."""
    answers, end = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("fork").Process(target=_answer, args=(task, end, folder, limited))
        child.start()
        end.close()
        try:
            return answers.recv() if answers.poll(4 * LIMIT_S if limited else 40 * LIMIT_S) else CRASH
        except EOFError:
            return CRASH
        finally:
            child.kill()
            child.join()


def _answer(task: Callable[[], str], end, folder: str, limited: bool) -> None:
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        spent_s = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent_s + LIMIT_S, spent_s + LIMIT_S))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        answer = task()
    end.send(answer)
    end.close()
    os._exit(0)


def asked(case: Case, name: str) -> bool:
    """Whether the input is one for that peer."""
    return case.make is not None and not (name == "nibabel" and 66 <= case.number <= 73)


def judge(case: Case) -> dict[str, str]:
    """The class of what each does."""
    found = {"medseg-diff": alone(lambda: ours(case), limited=False)}
    for name, read in PEERS.items():
        found[name] = alone(lambda read=read: peer(case, read), limited=True) if asked(case, name) else NOT_ASKED
    print(case.number, case.what, *found.values(), sep=" | ", file=sys.stderr)
    return found


def totals(results: list[tuple[Case, dict[str, str]]]) -> str:
    """A table of how many numbers of the list end in which class, by the worst of their inputs."""
    lines = [f"| | {RIGHT} | {WRONG} | {CRASH} | of |", "|---|---|---|---|---|"]
    order = [NOT_ASKED, RIGHT, CRASH, WRONG]
    for name in results[0][1]:
        numbers = groupby(results, key=lambda result: result[0].number)
        worst = [max((found[name] for _, found in group), key=order.index) for _, group in numbers]
        count = Counter(answer for answer in worst if answer != NOT_ASKED)
        counts = " | ".join(str(count[answer]) for answer in (RIGHT, WRONG, CRASH))
        lines.append(f"| {name} | {counts} | {count.total()} |")
    return "\n".join(lines)


def main() -> None:
    results = [(case, judge(case)) for case in CASES]
    head = HEAD.format(
        totals=totals(results), seconds=MOST_S, limit=LIMIT_S,
        nib=nib.__version__, monai=monai.__version__, sitk=sitk.Version.VersionString(),
    )  # fmt: skip
    rows = [f"| {case.number} | {case.what} | {case.must} | {' | '.join(found.values())} |" for case, found in results]
    PAGE.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
