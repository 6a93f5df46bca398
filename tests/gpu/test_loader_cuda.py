"""The loader beside a GPU that lags behind it."""

import torch

from data import build_eval_loader
from mambavision.config import DataConfig
from tests.unit.data_samples import make_betons, make_folder


def test_images_are_not_overwritten_before_a_slow_gpu_has_copied_them(cuda, tmp_path):
    betons = make_betons(make_folder(tmp_path / "folder", train=3, val=64), tmp_path, write_mode="original")
    config = DataConfig(source="ffcv", path=str(betons), image_size=32, num_workers=2)
    loader = build_eval_loader(config, batch_size=4)
    right = {int(i): image.clone() for batch in loader for i, image in zip(batch.indices, batch.images)}
    copies = []
    for batch in loader:
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms: the copy is queued behind it
        copies.append(batch.to(cuda))
    loader.close()
    assert len(right) == 64
    for batch in copies:
        for index, image in zip(batch.indices.tolist(), batch.images.cpu()):
            assert torch.equal(image, right[index]), f"sample {index}"
