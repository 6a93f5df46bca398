"""The loader benchmark runs from a plain folder of images and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data_samples import smooth_image

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_writes_rates_ratios_and_the_time_to_the_first_batch(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        smooth_image(number, 90 + number, 70).save(images / f"{number}.jpg")
    command = [sys.executable, "scripts/bench_loader.py", f"--data={images}", f"--json={tmp_path / 'out.json'}"]
    options = ["--samples=32", "--batch=8", "--repeats=2", "--image-size=32", "--workers=1"]
    rows = ["torchvision_pil", "ffcv", "ours", "ours_full_recipe", "decode_bound"]
    subprocess.run([*command, *options, "--rows", *rows], cwd=ROOT, check=True, timeout=240, capture_output=True)
    content = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in content["results"]] == rows
    assert all(row["img_per_sec"] > 0 and row["n"] == 2 for row in content["results"])
    assert set(content["first_batch_seconds"]) == {"ffcv", "ours"}
    assert content["ratios"]["ours/ffcv"] > 0
    assert content["machine"]["cores"] >= 1
