"""Damaged files of every kind, one after another: `make fuzz MINUTES=10`.

A child process reads them in a scratch folder, under limits. Whatever is no UserError, takes more than MOST_S seconds
of the processor or more than MOST_BYTES beyond what the program needs, writes outside the scratch folder, starts a
program or kills the child is a finding: the input is kept in `--keep`, and the child goes on with the next.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from conftest import untrained

from fuzz.corpus import damaged, make_corpus
from medseg_diff.checkpoint import load_model
from medseg_diff.config_file import load_config
from medseg_diff.errors import UserError
from medseg_diff.scans.find import Source, opened
from medseg_diff.scans.read import read_label_map, read_scan

MOST_S, MOST_BYTES, HANGING_S = 5.0, 1 << 30, 60.0
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def read(path: Path) -> None:
    """All that the program does with a file of this kind before it trusts it."""
    match path.suffix:
        case ".safetensors":
            load_model(path, torch.device("cpu"))
        case ".yaml":
            load_config(path)
        case _:
            with opened(Source(path, path)) as held:
                for one in held:
                    try:
                        read_scan(one.path)
                    finally:
                        read_label_map(one.path)


def trial(path: Path, reader: Callable[[Path], None] = read) -> str | None:
    """What is wrong with how a file was read; nothing where it was read, or refused."""
    begun = time.process_time()
    try:
        reader(path)
    except UserError as error:
        if "more memory than there is" in error.what:
            return "it takes too much memory"
    except BaseException as error:
        places = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(place.filename).name}:{place.lineno}" for place in places if "medseg_diff" in place.filename]
        return f"{type(error).__name__} in {own[-1] if own else 'nothing of ours'}: {error}"
    taken = time.process_time() - begun
    return f"it takes {taken:.1f} s" if taken > MOST_S else None


def child(pipe: Connection, corpus: dict[str, bytes], scratch: Path, seed: int, start: int) -> None:
    """Tries one input after another; tells of each before it is read, and of what was found."""
    os.chdir(scratch)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    outside: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & WRITES:
            place = os.path.realpath(arguments[0])
            if not place.startswith((str(scratch), "/dev/null", "/proc/")):
                outside.append(f"it writes to {place}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect"):
            outside.append(f"it calls {event}")

    claimed = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (claimed + MOST_BYTES, resource.RLIM_INFINITY))
    sys.addaudithook(watch)
    index = start
    while True:
        name, content = damaged(corpus, seed, index)
        path = scratch / name
        path.write_bytes(content)
        pipe.send((index, None))
        found = trial(path) or next(iter(outside), None)
        path.unlink(missing_ok=True)
        left = [str(entry.name) for entry in scratch.iterdir()]
        found = found or (f"it leaves {left}" if left else None)
        if found:
            pipe.send((index, found))
        outside.clear()
        index += 1


def run(seed: int, most: int, minutes: float, keep: Path) -> tuple[int, dict[str, int]]:
    """How many inputs were read, and each kind of finding with the first input that shows it."""
    findings: dict[str, int] = {}
    ends = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name) / "corpus", Path(name).resolve() / "scratch"
        folder.mkdir()
        make_corpus(folder, untrained(Path(name) / "model.safetensors"))
        corpus = {path.name: path.read_bytes() for path in folder.iterdir()}

        def note(index: int, what: str) -> None:
            key = what.partition(": ")[0]
            if key not in findings:
                findings[key] = index
                keep.mkdir(parents=True, exist_ok=True)
                damaged_name, content = damaged(corpus, seed, index)
                (keep / f"{seed}_{index}_{damaged_name}").write_bytes(content)
                print(f"input {index} ({damaged_name}): {what}", flush=True)

        for path in folder.iterdir():
            if complaint := trial(path):
                raise AssertionError(f"the corpus is bad: {path.name}: {complaint}")
        index = 0
        while index < most and time.monotonic() < ends:
            scratch.mkdir()
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(
                target=child, args=(theirs, corpus, scratch, seed, index)
            )
            process.start()
            theirs.close()
            try:
                while index < most and time.monotonic() < ends:
                    if not ours.poll(HANGING_S):
                        note(index, f"it hangs for {HANGING_S:.0f} s")
                        break
                    index, what = ours.recv()
                    if what:
                        note(index, what)
            except EOFError:
                process.join()
                note(index, f"the process dies with {process.exitcode}")
            finally:
                process.kill()
                process.join()
            index += 1
            for left in sorted(scratch.rglob("*"), reverse=True):
                left.rmdir() if left.is_dir() and not left.is_symlink() else left.unlink()
            scratch.rmdir()
    return index, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--inputs", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    count, findings = run(options.seed, options.inputs, options.minutes, options.keep)
    seconds = time.monotonic() - begun
    print(f"{count} inputs in {seconds:.0f} s, {count / seconds:.0f} a second: {len(findings)} kinds of findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
