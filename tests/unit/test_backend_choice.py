"""Which CUDA scan is taken, decided from times that the test gives: no GPU is needed to check the decision."""

import json
import logging

import pytest
import torch

from mambavision.ops import backend_choice
from mambavision.ops.backend_choice import Problem, choose_cuda_backend

PROBLEM = Problem(rows=100, tokens=49, channels=320, states=8, dtype=torch.bfloat16)
BOTH = ("triton", "mamba_ssm")
CPU = torch.device("cpu")


@pytest.fixture
def timed():
    """A measuring function over given times, and the list of what it was asked for."""

    def make(**times):
        asked = []

        def measure(name, problem, device):
            asked.append((name, problem.rows))
            if isinstance(times[name], Exception):
                raise times[name]
            return times[name]

        return measure, asked

    return make


def choose(measure, tmp_path, problem=PROBLEM, file="choice.json"):
    return choose_cuda_backend(problem, CPU, installed=BOTH, measure=measure, cache_file=tmp_path / file)


def test_the_faster_one_is_taken_and_said(timed, tmp_path, caplog):
    measure, _ = timed(triton=1.0, mamba_ssm=0.5)
    with caplog.at_level(logging.INFO, logger=backend_choice.__name__):
        assert choose(measure, tmp_path) == "mamba_ssm"
    assert "mamba_ssm (forward + backward: triton 1.000 ms, mamba_ssm 0.500 ms" in caplog.text
    assert choose(timed(triton=0.5, mamba_ssm=1.0)[0], tmp_path, file="other.json") == "triton"


def test_a_tie_within_noise_goes_to_triton(timed, tmp_path):
    assert choose(timed(triton=1.0, mamba_ssm=0.95)[0], tmp_path) == "triton"


def test_one_measurement_serves_the_process_the_disk_and_smaller_last_batches(timed, tmp_path, caplog):
    measure, asked = timed(triton=2.0, mamba_ssm=1.0)
    with caplog.at_level(logging.INFO, logger=backend_choice.__name__):
        for rows in (128, 100, 65):
            assert choose(measure, tmp_path, PROBLEM._replace(rows=rows)) == "mamba_ssm"
    assert asked == [("triton", 128), ("mamba_ssm", 128)]
    assert len(caplog.records) == 1
    backend_choice._chosen.clear()  # as a new process would start
    assert choose(measure, tmp_path) == "mamba_ssm"
    assert len(asked) == 2
    choose(measure, tmp_path, PROBLEM._replace(dtype=torch.float32))
    assert len(asked) == 4
    assert len(json.loads((tmp_path / "choice.json").read_text())) == 2


def test_a_mamba_ssm_built_for_another_torch_is_passed_over_with_a_warning(timed, tmp_path):
    broken = ImportError("selective_scan_cuda.so: undefined symbol: _ZN3c10")
    with pytest.warns(UserWarning, match="does not run here.*undefined symbol.*Reinstall"):
        assert choose(timed(triton=1.0, mamba_ssm=broken)[0], tmp_path) == "triton"


def test_a_damaged_memory_is_measured_again(timed, tmp_path):
    (tmp_path / "choice.json").write_text("{half a")
    with pytest.warns(UserWarning, match="cannot read"):
        assert choose(timed(triton=1.0, mamba_ssm=0.5)[0], tmp_path) == "mamba_ssm"


def test_one_installed_needs_no_measurement_and_none_is_an_error_with_advice(timed, tmp_path):
    measure, asked = timed(triton=1.0, mamba_ssm=1.0)
    assert choose_cuda_backend(PROBLEM, CPU, installed=("mamba_ssm",), measure=measure) == "mamba_ssm"
    assert not asked
    with pytest.raises(RuntimeError, match=r"pip install triton.*requirements-gpu\.txt.*scan_backend=reference"):
        choose_cuda_backend(PROBLEM, CPU, installed=(), measure=measure)


def test_looking_for_backends_does_not_import_mamba_ssm():
    import sys

    assert set(backend_choice.installed_backends()) <= set(BOTH)
    assert "mamba_ssm" not in sys.modules
