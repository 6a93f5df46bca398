"""A training step of the network on a CUDA device: no host sync in it, and equal to the CPU's."""

import pytest
import torch
import torch.nn.functional as F

from mambavision import create_model
from mambavision.optim import Lamb


@pytest.fixture
def model(cuda):
    torch.manual_seed(0)
    return create_model("mambavision_t", num_classes=10).to(cuda, memory_format=torch.channels_last)


def step(model, optimizer, images, targets):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(images), targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def test_a_training_step_does_not_wait_for_the_device(model, cuda, no_host_sync):
    optimizer = Lamb(model.parameters(), lr=1e-3)
    images = torch.randn(8, 3, 224, 224, device=cuda).to(memory_format=torch.channels_last)
    targets = torch.randint(10, (8,), device=cuda)
    for _ in range(2):  # compiles kernels, makes the optimizer's state
        step(model, optimizer, images, targets)
    with no_host_sync:
        loss = step(model, optimizer, images, targets)
    assert torch.isfinite(loss)


def test_the_network_gives_on_cuda_what_it_gives_on_the_cpu(model, cuda):
    model.eval()
    images = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        on_cuda = model(images.to(cuda)).cpu()
        on_cpu = model.cpu()(images)
    # Convolutions may run in TF32 (10 bits of mantissa).
    torch.testing.assert_close(on_cuda, on_cpu, rtol=2e-2, atol=2e-2 * on_cpu.abs().max().item())
