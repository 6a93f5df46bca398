"""A training step of the network on a CUDA device: no host sync in it, and equal to the CPU's."""

import pytest
import torch
import torch.nn.functional as F

from mambavision import create_model
from mambavision.distributed import BatchNormAverager
from mambavision.optim import Lamb, ModelEma, global_grad_norm


@pytest.fixture
def model(cuda):
    torch.manual_seed(0)
    return create_model("mambavision_t", num_classes=10).to(cuda, memory_format=torch.channels_last)


def step(model, optimizer, averager, ema, images, targets):
    """As the trainer takes it, over two micro-batches."""
    averager.begin_step()
    for index in range(2):
        averager.begin_micro_batch(index)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images), targets) / 2
        loss.backward()
    norm = global_grad_norm(model.parameters())
    averager.finish_step(2, norm)
    optimizer.step(grad_norm=norm, clip=5.0)
    ema.update(model, 0, grad_norm=norm)
    optimizer.zero_grad(set_to_none=False)
    return loss.detach()


def test_a_training_step_does_not_wait_for_the_device(model, cuda, no_host_sync):
    parts = Lamb(model.parameters(), lr=1e-3), BatchNormAverager(model), ModelEma(model, 0.99)
    images = torch.randn(8, 3, 224, 224, device=cuda).to(memory_format=torch.channels_last)
    targets = torch.randint(10, (8,), device=cuda)
    for _ in range(2):  # compiles kernels, makes the optimizer's state
        step(model, *parts, images, targets)
    with no_host_sync:
        loss = step(model, *parts, images, targets)
    assert torch.isfinite(loss)


def test_the_network_gives_on_cuda_what_it_gives_on_the_cpu(model, cuda):
    model.eval()
    images = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        on_cuda = model(images.to(cuda)).cpu()
        on_cpu = model.cpu()(images)
    # Convolutions may run in TF32 (10 bits of mantissa).
    torch.testing.assert_close(on_cuda, on_cpu, rtol=2e-2, atol=2e-2 * on_cpu.abs().max().item())
