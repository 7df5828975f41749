import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medseg_diff import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
PINS = {
    canonicalize_name(name): pin
    for name, pin in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_every_dependency_has_its_reason_and_its_pin(requirement):
    line = next(x for x in (ROOT / "pyproject.toml").read_text().splitlines() if f'"{requirement.name}>' in x)
    assert "# " in line, f"say beside {requirement.name} what it is for"
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_all_that_is_installed_is_pinned():
    installed, done, ahead = {}, set(), list(DECLARED)
    while ahead:
        requirement = ahead.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if (name, *extras) in done or name == "torch":  # what torch needs differs between its builds
            continue
        done.add((name, *extras))
        installed[name] = version(name).split("+")[0]
        further = [Requirement(line) for line in requires(name) or []]
        ahead += [r for r in further if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    assert installed == {name: PINS.get(name) for name in installed}, "make setup brings .venv up to date"
    assert PINS["torch"] == "2.13.0"


def test_make_explains_itself_and_set_up_is_shared():
    rules = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in rules for target in ("setup", "demo", "test", "lint", "format"))
    for target in ("demo", "test"):
        plan = subprocess.run(
            ["make", "-C", ROOT, "-n", "-W", "constraints.txt", target], capture_output=True, text=True, check=True
        ).stdout
        assert plan.index("pip install -c") < plan.index(f".venv/bin/{'pytest' if target == 'test' else 'medseg-diff'}")


def test_compose_trains_against_its_own_mlflow():
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    services = compose["services"]
    assert services.keys() == {"mlflow", "train", "train-cuda"}
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE))
    for service in services.values():
        assert service["build"]["target"] in stages
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert any("sqlite:////mlflow/" in argument for argument in services["mlflow"]["command"])
    assert "mlflow:/mlflow" in services["mlflow"]["volumes"]
    uri = services["train"]["command"][-1].removeprefix("tracking.uri=http://")
    assert any("--allowed-hosts" in argument and uri in argument for argument in services["mlflow"]["command"])
    assert services["train-cuda"]["build"]["target"] == "cuda"
    named = {volume.split(":")[0] for service in services.values() for volume in service["volumes"] if volume[0] != "."}
    assert named == compose["volumes"].keys()


def test_image_runs_as_an_ordinary_user_and_finds_what_it_copies():
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    assert lines.index("USER medseg") < lines.index('ENTRYPOINT ["medseg-diff"]')
    shipped = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {word for line in lines if line.startswith("COPY") and "--from" not in line for word in line.split()[1:-1]}
    assert {word for word in copied if not word.startswith("--")} == shipped


def test_hooks_run_what_make_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    tools = {Path(hook["entry"].split()[0]).name for hook in hooks}
    assert tools == {"ruff", "lint-imports", "mypy"}
    assert all((ROOT / ".venv").is_dir() is False or (ROOT / hook["entry"].split()[0]).is_file() for hook in hooks)


def test_versions_and_licence_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_the_package_declares_what_it_imports():
    """Nothing is imported that is there only because something else needs it."""
    homes = {"yaml": "pyyaml", "skimage": "scikit-image", "SimpleITK": "simpleitk", "PIL": "pillow"}
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    for path in (ROOT / "medseg_diff").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"medseg_diff"}:
                assert canonicalize_name(homes.get(name, name)) in declared, f"{path.name} imports {name}"
