"""What an installation by pip brings is what requirements.txt lists."""

import re

from common.config import REPOSITORY


def test_pyproject_declares_the_requirements() -> None:
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.partition("#")[0].strip() for line in lines]
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    (declared,) = re.findall(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert re.findall(r'"(.+)"', declared) == [line for line in listed if line[:1].isalpha()]
    assert listed[-1] == "-e ."
