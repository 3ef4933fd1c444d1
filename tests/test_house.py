"""Rules of the repository itself: who imports whom, names of files, the shipped settings."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from common.config import REPOSITORY, load_config
from common.config_types import leaf_types
from inpainter.settings import PicardConfig
from tests.tiny_runs import CONFIGS, DiaFile

MAY_IMPORT = {
    "common": {"common"},
    "inpainter": {"common", "inpainter"},
    "diffusion_models": {"common", "diffusion_models"},
    "dia": {"common", "diffusion_models", "dia"},
}
CODE_FOLDERS = [*MAY_IMPORT, "demos", "benchmarks", "tests"]
THIRD_PARTY = {
    *("torch", "torchvision", "numpy", "scipy", "yaml", "PIL", "sklearn", "tensorboard"),
    *("matplotlib", "tqdm", "nrrd", "pydicom", "tifffile", "pytest"),
}


def python_files() -> list[Path]:
    nested = [file for name in CODE_FOLDERS for file in (REPOSITORY / name).rglob("*.py")]
    return sorted([*REPOSITORY.glob("*.py"), *nested])


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """Dotted names that a file imports anywhere; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the package's name"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def is_script(path: Path) -> bool:
    return 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_towards_common_only(package: str) -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {module}"
        for path in (REPOSITORY / package).rglob("*.py")
        if path.name != "selfcheck.py"  # a program that nothing imports, and that checks all
        for module in imported_modules(path)
        if module.split(".")[0] in set(CODE_FOLDERS) - MAY_IMPORT[package]
    ]
    assert wrong == []


def test_small_module_has_more_than_one_importer() -> None:
    """What one file needs is part of that file, up to the length of a screen or two."""
    packages = [REPOSITORY / name for name in (*MAY_IMPORT, "demos")]
    small = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): 0
        for package in packages
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
        and not is_script(path)
        and len(path.read_text(encoding="utf-8").splitlines()) < 80
    }
    for path in python_files():
        if not path.is_relative_to(REPOSITORY / "tests"):
            for module in imported_modules(path) & set(small):
                small[module] += 1
    assert [module for module, importers in small.items() if importers < 2] == []


def test_no_script_is_imported() -> None:
    scripts = {path for path in python_files() if is_script(path)}
    names = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in scripts}
    names |= {path.stem for path in scripts if path.parent.name in ("benchmarks", "demos")}
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {module}"
        for path in python_files()
        for module in imported_modules(path)
        if module in names
    ]
    assert wrong == []


def test_nothing_beside_a_script_has_the_name_of_a_standard_or_third_party_module() -> None:
    folders = {path.parent for path in python_files() if is_script(path)} | {REPOSITORY}
    beside = [path for folder in folders for path in folder.iterdir()]
    importable = [path for path in beside if path.suffix == ".py" or path.is_dir()]
    taken = sys.stdlib_module_names | THIRD_PARTY
    assert [str(path) for path in importable if path.stem in taken] == []


def test_packages_read_files_that_may_be_another_s_by_one_function_each() -> None:
    """open_regular never waits for a pipe, load_tensors runs no code and notices damage."""
    found = {
        (path.relative_to(REPOSITORY).as_posix(), call)
        for path in python_files()
        if path.relative_to(REPOSITORY).parts[0] in MAY_IMPORT or path.parent == REPOSITORY
        for call in re.findall(
            r"""torch\.load\(|\.read_text\(|\.read_bytes\(|\.open\((?:"r|encoding)""",
            path.read_text(encoding="utf-8"),
        )
    }
    assert found == {
        ("common/checkpoint.py", "torch.load("),
        # of the system, and of this project
        ("common/claims.py", ".read_text("),
        ("common/devices.py", ".read_text("),
        ("common/html_report.py", ".read_text("),
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_file_loads(path: Path) -> None:
    sections = set(yaml.safe_load(path.read_text(encoding="utf-8")))
    cls = DiaFile if {"diffusion", "contrastive"} & sections else PicardConfig
    assert isinstance(load_config(cls, path), cls)


def test_absent_keys_mean_the_published_settings() -> None:
    assert load_config(PicardConfig, REPOSITORY / "configs" / "published.yaml") == PicardConfig()


def test_default_file_shows_every_setting_and_marks_what_is_not_published() -> None:
    folder = REPOSITORY / "configs"
    text = (folder / "default.yaml").read_text(encoding="utf-8")
    default, published = flat(folder / "default.yaml"), flat(folder / "published.yaml")
    assert set(default) == set(leaf_types(PicardConfig))
    named_by_the_user = {"dataset_name", "train_data_path", "test_data_path"}
    ours = {key for key in default if key not in published or default[key] != published[key]}
    unmarked = [
        line.strip()
        for key, line in lines_by_key(text)
        if (key in ours - named_by_the_user) != ("# ours" in line)
    ]
    assert unmarked == []


def flat(path: Path) -> dict[str, object]:
    """The values of a file with at most one level of sections, by dotted key."""
    values: dict[str, object] = {}
    for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        inner = value.items() if isinstance(value, dict) else None
        values |= {f"{name}.{key}": v for key, v in inner} if inner is not None else {name: value}
    return values


def lines_by_key(text: str) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, line) of a file with at most one level of sections."""
    section = ""
    for line in text.splitlines():
        name, colon, _ = line.partition(":")
        if not colon or line.lstrip().startswith(("#", "-")):
            continue
        if not line.startswith(" "):
            section = name if line.rstrip() == f"{name}:" else ""
        yield (f"{section}.{name.strip()}" if line.startswith(" ") else name), line
