"""`make demo` in small, and the comparison of engines on what it left."""

import json
import re

import pytest


@pytest.mark.slow
def test_the_demo_ends_in_its_table_and_pictures_and_its_engines_agree(tmp_path, run_demo) -> None:
    table = run_demo("demos/phantom.py", "--tiny", "--output", tmp_path)
    for name in ("mass", "distortion", "calcifications", "MCD_image M=1", "MCD_image calibrated"):
        assert f"\n{name}" in table or f"\n  {name} " in table
    assert (tmp_path / "contact_sheet.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert {row["group"] for row in rows} == {"mass", "distortion", "calcifications"}

    small = ("netG.ngf=4", "test.patch_stride=16", "test.heatmap_M_inpaint=2")  # as --tiny has it
    settings = [part for setting in small for part in ("--set", setting)]
    choice = ["--demo", "phantom", "--output", tmp_path, "--rows", "plain", "fast", "refine 2"]
    lines = run_demo("benchmarks/engines.py", *choice, *settings).splitlines()[-3:]
    row = re.compile(r"(.{10}) +[\d.]+ s +(\d+) windows +(.*)")
    names, windows, scores = zip(*(row.fullmatch(line).groups() for line in lines), strict=True)
    assert [name.strip() for name in names] == ["plain", "fast", "refine 2"]
    assert int(windows[2]) < int(windows[0]) == int(windows[1])
    assert scores[0] == scores[1]  # to four digits
    assert "MCD_image 0." in scores[0]
