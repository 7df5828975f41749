"""75-78: models, archives, configurations and tracking stores that would run code, fill the disk or contradict."""

import io
import json
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import untrained
from safetensors.torch import load, save

from bad_inputs.case import Case, Maker, call, files, refused, segment
from bad_inputs.labels import CONFIG, phantom
from bad_inputs.nifti import file, nifti

TRACE = Path("pwned")
BOMB_MEMBERS, BOMB_BYTES = 1000, 2**32 - 2


class Payload:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {TRACE}",)


def with_model(path: Path) -> list[object]:
    """A good scan, segmented by the model."""
    return [*segment(file("good.nii", nifti())(Path())), "--model", path]


def train(path: Path) -> list[object]:
    """The configuration, held against a phantom set."""
    return ["train", "--config", path, "--set", f"data.root={phantom()}", "--set", "data.cache=cache", "--dry-run"]


def _pickled(folder: Path) -> Path:
    torch.save({"weights": Payload()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def _changed(change: Callable[[bytes], bytes]) -> Maker:
    """A whole model file, its bytes changed."""

    def make(folder: Path) -> Path:
        path = untrained(folder / "model.safetensors")
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def _flipped(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 16]) + content[-99:]


def _claiming(content: bytes) -> bytes:
    return save({"mean_head.bias": torch.ones(1)}, _metadata(content)).replace(b"[1]", b"[1000000000]")


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _weights_of(kind: str) -> Callable[[bytes], bytes]:
    """The header as it is, the weights of another network."""

    def change(content: bytes) -> bytes:
        other = untrained(Path("other.safetensors"), kind)
        weights = load(other.read_bytes())
        other.unlink()
        return save(weights, metadata=_metadata(content))

    return change


def _with_nan(content: bytes) -> bytes:
    """One weight NaN, the digest right: as a training that went wrong would have written it."""
    from medseg_diff.checkpoint import _digest

    weights, metadata = load(content), _metadata(content)
    weights[min(weights)].view(-1)[0] = torch.nan
    digest = _digest(dict(sorted(weights.items())), metadata["description"])
    return save(weights, metadata=metadata | {"digest": digest})


def _metadata(content: bytes) -> dict[str, str]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def _model(number: int, what: str, make: Maker, says: str) -> Case:
    """Refused, and no code of it runs."""
    case = refused(number, what, make, says, with_model, "refuse, no code runs, memory bounded", scan=False)

    def check(folder: Path) -> None:
        case.check(folder)
        assert not TRACE.exists()

    return Case(number, what, case.must, check)


def _zipped(member: zipfile.ZipInfo | str) -> Maker:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            archive.writestr(member, b"x")
        return folder / "a.zip"

    return make


def _link() -> zipfile.ZipInfo:
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return link


def _bomb(folder: Path) -> Path:
    """A directory of a thousand members of 4 GiB each, all of them the same few bytes of the file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0000.dcm", bytes(1 << 20))
    whole = content.getvalue()
    start, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    entry = bytearray(whole[start:end])
    entry[24:28] = struct.pack("<I", BOMB_BYTES)
    entries = [bytes(entry).replace(b"0000.dcm", f"{i:04}.dcm".encode()) for i in range(BOMB_MEMBERS)]
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, BOMB_MEMBERS, BOMB_MEMBERS, sum(map(len, entries)), start, 0)
    (folder / "a.zip").write_bytes(whole[:start] + b"".join(entries) + tail)
    return folder / "a.zip"


def _settings(number: int, what: str, text: str, says: str) -> Case:
    """A small configuration with more text after it."""
    content = f"data: {{modality: ct, size: [32, 32, 16]}}\n{text}\n".encode()
    must = "refuse, name the key"
    return refused(number, what, file("mine.yaml", content), says, train, must, scan=False)


def _check_classes(folder: Path) -> None:
    """A model of other labels than the set's is not scored on it."""
    model = untrained(folder / "model.safetensors")
    before = files(folder)
    code, out, err = call("evaluate", "--model", model, "--data", phantom(), "--uri", "")
    assert (code, out) == (2, "")
    assert "its labels are" in err
    assert "205: 'shell'" in err
    assert files(folder) == before


def _run(folder: Path, *options: object) -> tuple[int, str, str]:
    """Training for one step on a phantom."""
    budget = ("train.steps=1", "train.validations=1", "segment.samples=2")
    settings = (f"data.root={phantom()}", "data.cache=cache", "network.widths=[8,8,8,8]", *budget)
    pairs = [part for setting in settings for part in ("--set", setting)]
    return call("train", "--config", CONFIG, *pairs, "--name", "run", *options)


def _check_store(uri: str) -> Callable[[Path], None]:
    """The run ends well, with one warning, and keeps its scores in its own files."""

    def check(folder: Path) -> None:
        code, out, err = _run(folder, "--set", f"tracking.uri={uri}")
        assert code == 0, (out, err)
        assert err.count("MLflow failed, and the run goes on") == 1, err
        assert "val/dice" in Path("runs/run/metrics.csv").read_text()
        assert {path.name for path in folder.iterdir()} <= {"runs", "cache"}

    return check


def escaped(folder: Path) -> bool:
    """Whether a name led to one of the folders above."""
    return any((above / "escaped").exists() for above in (folder, *folder.parents))


def _check_run_name(folder: Path) -> None:
    code, _, err = _run(folder, "--name", "../../escaped")
    assert code == 2
    assert "--name '../../escaped': is no plain name. Use" in err
    assert not escaped(folder)


def _check_experiment(folder: Path) -> None:
    """It is the name of an experiment, and of no folder."""
    code, out, err = _run(folder, "--set", "tracking.experiment=../../../escaped")
    assert code == 0, (out, err)
    assert "MLflow failed" not in err
    assert not escaped(folder)
    assert {path.name for path in folder.iterdir()} == {"runs", "cache", "mlflow.db", "mlartifacts"}


STORE = "trains on, one warning, scores kept"
OUTSIDE = "encrypted, a link, nameless, or would be written outside"
MEMBER = "refuse, nothing written outside"

CASES = [
    _model(75, "a model that is a pickle of os.system", _pickled, "no readable model"),
    _model(
        75,
        "a pickle of an unknown class",
        file("model.safetensors", b"cnowhere\nNothing\n."),
        "no readable model",
    ),
    _model(
        75,
        "a shape of 10^9 numbers in a tiny file",
        _changed(_claiming),
        "no readable model",
    ),
    _model(75, "a model cut in the middle", _changed(_half), "no readable model"),
    _model(75, "one flipped bit of a weight", _changed(_flipped), "does not fit the digest"),
    _model(75, "the weights of another architecture", _changed(_weights_of("unet")), "do not fit the network"),
    _model(75, "a weight of NaN", _changed(_with_nan), "are not finite"),
    refused(76, "a zip with a member ../", _zipped("../evil.dcm"), OUTSIDE, must=MEMBER, scan=False),
    refused(76, "a zip with an absolute path", _zipped("/tmp/evil.dcm"), OUTSIDE, must=MEMBER, scan=False),
    refused(76, "a zip with a link", _zipped(_link()), OUTSIDE, must=MEMBER, scan=False),
    refused(76, "a zip of 60 KB that unzips to 4 TB", _bomb, "would unzip to", scan=False),
    _settings(77, "a YAML of !!python/object", "seed: !!python/object/apply:os.system [touch pwned]", "mine.yaml"),
    _settings(77, "an unknown key", "zzz: 5", "zzz: unknown key"),
    _settings(77, "a misspelt key", "train: {stesp: 5}", r"train.stesp: unknown key, did you mean train.steps\?"),
    _settings(77, "steps: -1", "train: {steps: -1}", r"train.steps: .*\(it is -1\)"),
    _settings(77, "lr: NaN", "train: {lr: .nan}", "train.lr: .*finite"),
    Case(77, "a data set of other classes than the model's", "refuse, name both", _check_classes),
    Case(78, "the run is named ../../escaped", "refuse", _check_run_name),
    Case(78, "the experiment is named ../../../escaped", "nothing outside", _check_experiment, slow=True),
    Case(78, "the store is file:///etc", STORE, _check_store("file:///etc")),
    Case(78, "the store is a server that does not answer", STORE, _check_store("http://127.0.0.1:9")),
]
