"""What is imported when: nothing heavy before it is used, nothing of CUDA on a CPU, and timm knows the models all the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambavision.ops.tracing import constant_when_traced

ROOT = Path(__file__).parents[2]
HEAVY = "{'timm', 'torchvision', 'wandb', 'sympy', 'torch._dynamo'}"


def run(*lines: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_a_slip_is_answered_before_torch_is_imported():
    done = run(
        "import sys, train",
        "sys.argv = ['train.py', 'optimizer.lrr=3']",
        "try: train.main()",
        "except SystemExit as ending: assert ending.code == 2",
        "import mambavision",
        "assert 'mambavision_t' in mambavision.models.VARIANTS and mambavision.VARIANTS is mambavision.models.VARIANTS",
        "assert 'torch' not in sys.modules",
    )
    assert "did you mean optimizer.lr" in done.stderr


@pytest.mark.slow
def test_a_model_trains_on_the_cpu_without_anything_heavy_or_of_cuda():
    run(
        "import sys, torch, mambavision",
        "from mambavision.optim import Lamb",
        "model = mambavision.create_model('mambavision_nano', num_classes=2)",
        "lamb = Lamb(model.parameters())",
        "model(torch.zeros(1, 3, 32, 32)).sum().backward()",
        "lamb.step(); lamb.zero_grad(); lamb.load_state_dict(lamb.state_dict())",
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)",
        "assert not [m for m in sys.modules if m.startswith(('mamba_ssm', 'selective_scan_cuda', 'causal_conv1d'))]",
        "assert not {'mambavision.ops.triton_scan', 'mambavision.ops.mamba_ssm_scan'} & set(sys.modules)",
        "assert 'mambavision.optim.triton_lists' not in sys.modules",
    )


@pytest.mark.slow
def test_a_model_needs_no_more_than_the_package_asks_for(tmp_path: Path):
    """Who installs the package by pip has torch and numpy, and what these bring with them."""
    asked = json.loads(re.search(r"^dependencies = (.+)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1])
    needed = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(asked) <= set(needed), "the same versions as for training"
    names = ("timm", "torchvision", "hydra", "omegaconf", "wandb", "ffcv", "torch_optimizer", "cv2", "numba")
    names += ("psutil", "tqdm", "PIL", "rich", "ninja", "xxhash", "safetensors", "mamba_ssm", "data")
    run(
        "import sys",
        f"sys.modules.update(dict.fromkeys({names}))  # as if they were not installed",
        "import torch, mambavision",
        "model = mambavision.create_model('mambavision_nano', num_classes=2)",
        "model(torch.zeros(1, 3, 32, 32)).sum().backward()",
        f"torch.save(model.state_dict(), {str(tmp_path / 'weights.pth')!r})",
        f"mambavision.create_model('mambavision_nano', num_classes=2, checkpoint={str(tmp_path / 'weights.pth')!r})",
    )


@pytest.mark.slow
def test_timm_knows_the_models_in_either_order_of_imports():
    run(
        "import sys, mambavision, timm",
        "assert timm.is_model('mambavision_t') and timm.is_model('mambavision_l3_512_21k')",
        "before = timm.model_entrypoint('mambavision_t')",
        "for name in [m for m in sys.modules if m.startswith('mambavision')]: del sys.modules[name]",
        "import mambavision  # with timm there already",
        "assert timm.model_entrypoint('mambavision_t') is not before",
    )


def test_the_mark_for_tracing_is_torchs():
    assert vars(torch.compiler.assume_constant_result(lambda: 1)) == vars(constant_when_traced(lambda: 1)) != {}


def test_a_name_that_does_not_exist_is_refused():
    import mambavision

    with pytest.raises(AttributeError, match="module 'mambavision' has no attribute 'creat_model'"):
        mambavision.creat_model  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Mamba'"):
        from mambavision.models import Mamba  # noqa: F401
