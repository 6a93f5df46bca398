"""ImageNet's variants on small folders in their own layouts: class numbers, subsets, counts, ReaL, mCE."""

import numpy as np
import pytest
import torch

from data import build_eval_loader
from data.variants import ALEXNET_ERRORS, EvalSet, folder_set, real_labels, wordnet_ids
from mambavision.compose import compose_eval_config
from mambavision.config import DataConfig
from tests.unit.data_samples import make_folder, smooth_image


def make_classes(root, folders, images=2):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(images):
            smooth_image(number, 20, 24).save(root / folder / f"{number}.JPEG")
    return root


def load(root, name, **settings):
    data = DataConfig(source="folder", path=str(root), image_size=16, num_workers=1, **settings)
    loader = build_eval_loader(data, batch_size=3, split=name)
    batches = [(b.targets.clone(), b.indices.clone()) for b in loader]
    loader.close()
    return loader, torch.cat([t for t, _ in batches]), torch.cat([i for _, i in batches])


def logits_for(answers, num_classes=1000):
    """Logits of a model that gives these answers."""
    return torch.nn.functional.one_hot(torch.as_tensor(answers), num_classes).float()


def test_v2_folders_are_numbers_not_names(tmp_path, caplog):
    loader, targets, _ = load(make_classes(tmp_path / "imagenetv2", ["0", "2", "10", "999"]), "imagenet_v2")
    assert sorted(targets.tolist()) == [0, 0, 2, 2, 10, 10, 999, 999]
    assert loader.num_classes == 1000 and "10000 images" in caplog.text


def test_wordnet_folders_get_imagenets_numbers(tmp_path):
    _, targets, _ = load(make_classes(tmp_path / "set" / "sketch", ["n01440764", "n15075141"]), "imagenet_sketch")
    assert targets.tolist() == [0, 0, 999, 999]


def test_imagenet_a_is_scored_among_its_200_classes(tmp_path):
    first, second = "n01498041", "n01531178"
    loader, targets, indices = load(make_classes(tmp_path, [first, second]), "imagenet_a")
    assert targets.tolist() == [wordnet_ids().index(n) for n in (first, first, second, second)]
    assert len(loader.eval_set.classes) == 200
    logits = logits_for(targets)
    logits[:, 0] = 5.0  # a class that ImageNet-A does not have: it may not be chosen
    logits[3] = logits_for([wordnet_ids().index(first)])[0]
    metrics = loader.eval_set.metrics(loader.eval_set.count(logits, targets, indices))
    assert metrics["top1"] == 75.0 and metrics["images"] == 4


def test_a_class_outside_the_subset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not among the 200 of imagenet_a"):
        folder_set("imagenet_a", make_classes(tmp_path, ["n01440764"]))


def test_imagenet_c_counts_each_corruption_and_severity(tmp_path):
    for corruption, severity in (("fog", 1), ("fog", 2), ("snow", 1)):
        make_classes(tmp_path / corruption / str(severity), ["n01440764"])
    loader, targets, indices = load(tmp_path, "imagenet_c")
    eval_set = loader.eval_set
    assert eval_set.groups == ("fog/1", "fog/2", "snow/1")
    answers = torch.tensor([0, 0, 0, 5, 5, 5])
    metrics = eval_set.metrics(eval_set.count(logits_for(answers), targets, indices))
    assert (metrics["fog/1/top1"], metrics["fog/2/top1"], metrics["snow/1/top1"]) == (100.0, 50.0, 0.0)
    assert metrics["top1"] == 50.0 and "mce" not in metrics


def test_mce_divides_by_alexnet():
    groups = tuple(f"{corruption}/{severity}" for corruption in ALEXNET_ERRORS for severity in range(1, 6))
    errors = np.repeat(list(ALEXNET_ERRORS.values()), 5)
    counts = torch.tensor(np.stack([1000 * (1 - errors), 1000 * (1 - errors), np.full(75, 1000.0)], 1))
    assert EvalSet("imagenet_c", groups=groups).metrics(counts)["mce"] == pytest.approx(100.0)


def test_real_takes_any_of_several_answers_and_skips_images_without(tmp_path):
    names = [f"n1/ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)]
    eval_set = real_labels(names)  # answers: none; 795 and 970; 230 and 231
    counts = eval_set.count(logits_for([7, 795, 5]), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    assert counts.tolist() == [[1.0, 1.0, 2.0]]
    with pytest.raises(ValueError, match=r"by their names; found cat\.jpg"):
        real_labels(["cat.jpg"])


def test_real_is_attached_to_the_validation_images(tmp_path):
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    smooth_image(0, 20, 20).save(tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000002.JPEG")
    loader, _, indices = load(tmp_path, "imagenet_real")
    assert loader.eval_set.acceptable[indices].nonzero()[:, 1].tolist() == [795, 970]


@pytest.mark.parametrize(
    ("name", "folders", "advice"),
    [
        ("imagenet_v2", ["n01440764"], "0 to 999"),
        ("imagenet_r", ["cat"], "WordNet ids"),
        ("imagenet_c", ["n01440764"], "severity"),
    ],
)
def test_another_layout_is_answered_with_the_expected_one(tmp_path, name, folders, advice):
    with pytest.raises(ValueError, match=advice):
        folder_set(name, make_classes(tmp_path, folders))


def test_an_unknown_set_is_answered_with_the_known_ones(tmp_path):
    data = DataConfig(source="folder", path=str(make_folder(tmp_path)))
    with pytest.raises(ValueError, match="imagenet_a, imagenet_r"):
        build_eval_loader(data, batch_size=1, split="imagenet_z")


@pytest.mark.parametrize(
    "name", ["val", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_c", "imagenet_real"]
)
def test_each_set_has_a_config(name):
    cfg = compose_eval_config(["checkpoint=x.pt", f"eval_set={name}", "data.path=/x"])
    assert cfg.eval_set == name
    assert cfg.data.source == ("ffcv" if name in ("val", "imagenet_real") else "folder")
