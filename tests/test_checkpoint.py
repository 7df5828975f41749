import dataclasses
import json
import os
import pickle
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from medseg_diff.checkpoint import (
    ENVIRONMENT,
    FINISHED,
    FORMAT,
    Description,
    build,
    describe,
    explain,
    find_model,
    load_model,
    load_state,
    save_model,
    save_state,
)
from medseg_diff.config import Config
from medseg_diff.config_file import parse_config
from medseg_diff.errors import UserError

CPU = torch.device("cpu")


def config(**changes: Any) -> Config:
    data = {"root": "d", "size": [32, 32], "spatial_dims": 2, "spacing_mm": [1, 1, 2.5]}
    return parse_config({"data": data, "network": {"kind": "unet", "widths": [8, 8, 8, 8]}} | changes, "test")


ABOUT = Description(
    config(), {0: "background", 7: "organ", 205: "größe"}, ("T1", "T2"), {"val/dice": 0.5}, {"name": "x"}, {"steps": 3}
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "m.safetensors", build(ABOUT.config, 2, 3).state_dict(), ABOUT)
    return tmp_path / "m.safetensors"


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_model_comes_back_as_it_was(model: Path):
    network = build(ABOUT.config, 2, 3)
    loaded = load_model(model, CPU)
    assert loaded.about == ABOUT
    assert describe(model) == (ABOUT, loaded.digest)
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor)
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())


def test_the_digest_depends_on_weights_and_description_alone(model: Path):
    weights = build(ABOUT.config, 2, 3).state_dict()
    digest = describe(model)[1]
    assert save_model(model.with_name("again.safetensors"), dict(reversed(weights.items())), ABOUT) == digest
    assert save_model(model, weights, dataclasses.replace(ABOUT, scores={"val/dice": 0.6})) != digest
    name = next(iter(weights))
    assert save_model(model, weights | {name: weights[name] + 1e-3}, ABOUT) != digest


def test_explain_gives_plain_values(model: Path):
    told = json.loads(json.dumps(explain(model)))
    assert told["labels"] == {"0": "background", "7": "organ", "205": "größe"}
    assert told["channels"] == ["T1", "T2"]
    assert told["scores"] == {"val/dice": 0.5}
    assert told["config"]["data"]["spacing_mm"] == [1, 1, 2.5]
    assert told["digest"] == load_model(model, CPU).digest


def test_weights_come_from_the_seed_alone():
    state = torch.get_rng_state()
    first, second, other = (build(config(), 1, 2), build(config(), 1, 2), build(config(seed=1), 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_any_flipped_byte_is_noticed(model: Path):
    content = model.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    places = [*range(8), *rng.integers(8, header, 60), *rng.integers(header, len(content), 20), len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        model.write_bytes(damaged)
        with pytest.raises(UserError):
            load_model(model, CPU)
    model.write_bytes(content)
    load_model(model, CPU)


def test_a_damaged_header_is_a_user_error_for_describe_too(model: Path):
    weights, whole = load(model.read_bytes()), json.loads(_metadata(model)["description"])
    metadata = _metadata(model)
    broken: list[dict[str, str]] = [
        {},
        {"format": FORMAT},
        {key: value for key, value in metadata.items() if key != "digest"},
        metadata | {"description": "[" * 100_000},
        metadata | {"description": "{"},
        metadata | {"description": "[]"},
        metadata | {"format": "medseg-diff model 2"},
        *(metadata | {"description": json.dumps({k: v for k, v in whole.items() if k != key})} for key in whole),
        *(
            metadata | {"description": json.dumps(whole | change)}
            for change in (
                {"labels": []},
                {"labels": {"x": "y"}},
                {"channels": 3},
                {"config": None},
                {"config": {}},
                {"calibration": []},
                {"calibration": {}},
                {"calibration": {"intervals": {"x": {}}}},
                {"calibration": {"intervals": {}, "colour": 1}},
            )
        ),
    ]
    for held in broken:
        model.write_bytes(save(weights, metadata=held))
        for read in (describe, lambda path: load_model(path, CPU)):
            with pytest.raises(UserError, match=r"m\.safetensors"):
                read(model)


def test_what_is_no_model_is_refused_and_runs_no_code(tmp_path: Path, model: Path):
    whole, path = model.read_bytes(), tmp_path / "foreign.safetensors"
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.pt")
    contents = {
        "empty": b"",
        "text": b"hello, this is no model at all",
        "pickle": pickle.dumps(Bomb(tmp_path / "pwned")),
        "torch": (tmp_path / "zip.pt").read_bytes(),
        "foreign": save({"a": torch.ones(2)}),
        "long header": (10**15).to_bytes(8, "little") + whole[8:],
        "huge shape": _raw('{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
        **{f"cut at {n}": whole[:n] for n in (1, 8, 100, len(whole) // 2, len(whole) - 1)},
        "longer": whole + b"\0",
    }
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"foreign\.safetensors.*Give a \.safetensors file") as caught:
            load_model(path, CPU)
        assert "\n" not in str(caught.value), name
    for absent in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(UserError):
            load_model(absent, CPU)
    assert not (tmp_path / "pwned").exists()


def test_a_header_that_claims_a_huge_network_claims_no_memory(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    huge = config(network={"kind": "conditional", "widths": [4096] * 5}, data={"root": "d", "size": [32] * 3})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for about in (
        dataclasses.replace(ABOUT, config=huge),
        dataclasses.replace(ABOUT, labels={k: str(k) for k in range(50_000)}),
    ):
        save_model(path, {"mean_head.bias": torch.ones(3)}, about)
        begun = time.monotonic()
        with pytest.raises(UserError, match="do not fit the network"):
            load_model(path, CPU)
        assert time.monotonic() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_weights_of_another_network_are_refused(model: Path):
    weights = load_model(model, CPU).network.state_dict()
    name = next(iter(weights))
    bad = torch.full_like(weights[name], torch.nan)
    for changed, message in (
        ({key: value for key, value in weights.items() if key != name}, f"{name} is None"),
        (weights | {"extra": torch.ones(1)}, r"extra is .*, not None"),
        (weights | {name: weights[name][:1]}, name),
        (weights | {name: bad}, f"{name} are not finite"),
    ):
        save_model(model, changed, ABOUT)
        with pytest.raises(UserError, match=message):
            load_model(model, CPU)


def test_a_foreign_kind_of_number_in_a_file_is_refused(model: Path):
    weights = load(model.read_bytes())
    name = next(iter(weights))
    model.write_bytes(save(weights | {name: weights[name].bfloat16()}, metadata=_metadata(model)))
    with pytest.raises(UserError, match="BF16"):
        load_model(model, CPU)


def test_a_full_disk_leaves_the_old_model_and_the_old_state(model: Path, monkeypatch: pytest.MonkeyPatch):
    old = model.read_bytes()
    state = model.with_name("state.pt")
    save_state(state, {"step": 1})

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match="No space left on device"):
            save_model(model, load(old), dataclasses.replace(ABOUT, scores={}))
        with pytest.raises(UserError, match="No space left on device"):
            save_state(state, {"step": 2})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=r"state\.pt: it cannot be written \(File too large\)"):
            save_state(state, {"step": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert model.read_bytes() == old
    assert load_state(state, CPU) == {"step": 1}
    assert sorted(path.name for path in model.parent.iterdir()) == ["m.safetensors", "state.pt"]


def test_a_state_comes_back_and_runs_no_code(tmp_path: Path):
    path = tmp_path / "state.pt"
    state = {"network": {"w": torch.arange(3.0)}, "counters": {"step": 5, "best": -float("inf"), "id": None}}
    save_state(path, state)
    found = load_state(path, CPU)
    assert found["counters"] == state["counters"]
    assert torch.equal(found["network"]["w"], torch.arange(3.0))
    torch.save({"a": Bomb(tmp_path / "pwned")}, tmp_path / "bomb.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no state")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-100])
    for name in ("bomb.pt", "list.pt", "text.pt", "cut.pt", "absent.pt"):
        with pytest.raises(UserError, match=rf"{name}: cannot be resumed.*--fresh"):
            load_state(tmp_path / name, CPU)
    assert not (tmp_path / "pwned").exists()


def test_find_model_as_given_from_the_environment_or_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(UserError, match=r"no model.*no finished run of task segment under \./runs.*Train one"):
        find_model(None, "segment")
    for age, (name, task, left) in enumerate(
        [
            ("newest", "segment", ["config.yaml", "best.safetensors"]),  # not finished
            ("damaged", "\x80", ["config.yaml", "best.safetensors", FINISHED]),
            ("empty", "segment", ["config.yaml", FINISHED]),
            ("images", "generate", ["config.yaml", "best.safetensors", FINISHED]),
            ("new", "segment", ["config.yaml", "best.safetensors", FINISHED]),
            ("old", "segment", ["config.yaml", "best.safetensors", FINISHED]),
        ]
    ):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        for file in left:
            (run / file).write_text(f"task: {task}\n", encoding="latin-1")
            os.utime(run / file, (1e9 - age, 1e9 - age))
    path, where = find_model(None, "segment")
    assert path == Path("runs/new/best.safetensors")
    assert where == "the newest finished run, runs/new"
    assert find_model(None, "generate")[0] == Path("runs/images/best.safetensors")

    monkeypatch.setenv(ENVIRONMENT, "runs/old")
    assert find_model(None, "segment") == (Path("runs/old/best.safetensors"), f"${ENVIRONMENT}")
    given = "runs/newest/best.safetensors"
    assert find_model(given, "segment") == (Path(given), f"--model {given}")
    for absent in ("runs/empty", "runs/nowhere", "nowhere.safetensors"):
        with pytest.raises(UserError, match=f"{absent}: there is no such model"):
            find_model(absent, "segment")


def _metadata(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def _raw(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()
