"""What an installation brings: by pip, by the lock, and in an image."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.config import REPOSITORY


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def required() -> list[str]:
    """What requirements.txt lists, without this project itself."""
    listed = [line.partition("#")[0].strip() for line in text_of("requirements.txt").splitlines()]
    assert listed[-1] == "-e ."
    return [line for line in listed if line[:1].isalpha()]


def test_pyproject_declares_the_requirements() -> None:
    project = text_of("pyproject.toml")
    (declared,) = re.findall(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert re.findall(r'"(.+)"', declared) == required()


def test_lock_has_a_version_of_every_requirement_that_satisfies_it_and_its_hashes() -> None:
    lock = text_of("requirements.lock")
    entries = dict(re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:", lock, re.MULTILINE))
    assert len(entries) == len(re.findall(r"^\w", lock, re.MULTILINE))  # no entry without a hash
    assert "://" not in lock
    for requirement in map(Requirement, required()):
        assert entries[canonicalize_name(requirement.name)] in requirement.specifier


def test_installed_versions_satisfy_the_requirements() -> None:
    for requirement in map(Requirement, required()):
        assert version(requirement.name) in requirement.specifier


def test_image_is_built_from_this_repository_and_runs_as_no_administrator() -> None:
    recipe = text_of("Dockerfile")
    sources = re.findall(r"^COPY (\S+) ", recipe, re.MULTILINE)
    assert sources == ["requirements.lock", "."]
    assert re.findall(r"^(?:USER|CMD) .*", recipe, re.MULTILINE)[0] == "USER researcher"
    kept_out = set(text_of(".dockerignore").splitlines())
    assert {".git", ".venv", "data", "checkpoints"} <= kept_out
    assert not kept_out & {"common", "inpainter", "dia", "diffusion_models", "configs", "tests"}


@pytest.mark.parametrize(
    "module",
    ["predict_heatmap", "eval", "train_dia", "inpainter.train", "diffusion_models.train_eval_ddpm"],
)
def test_programs_start_without_what_is_slow_to_import(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'torchvision' in sys.modules)"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "False"]
