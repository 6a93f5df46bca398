"""The same number of classes is not the same classes: what notices others, at resume, at evaluation, beside each other."""

import json
import shutil

import pytest
import torch

from data import build_eval_loader
from data.class_names import class_names, first_difference, renumbered
from data.conversion import WriteSettings, write_beton
from data.datasets import list_folder
from data.manifest import manifest_path
from mambavision.config import DataConfig, EvalConfig, ModelConfig
from mambavision.distributed import World
from mambavision.engine.build import describe_data
from mambavision.engine.score import check_classes
from mambavision.run_dir import RunDirectory
from scripts import check_data
from tests.unit.data_samples import make_betons, make_folder

WORLD = World(0, 1, 0, 1, torch.device("cpu"))


def test_names_that_are_numbers_say_nothing():
    assert class_names(["0", "1", "2"]) is None and class_names(["00", "01"]) is None
    assert class_names(["0", "1", "10", "2"]) == ["0", "1", "10", "2"], "sorted as text: 10 is class 2"
    assert class_names(["cat", "dog"]) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("before", "now", "difference", "other_numbers"),
    [
        (["cat", "dog"], ["cat", "dog"], "", False),
        (["cat", "dog"], ["cat", "hound"], "class 1 was 'dog', is 'hound'", False),
        (["cat", "dog"], ["dog", "wolf"], "class 0 was 'cat', is 'dog'", True),
        (["cat", "dog"], ["cat"], "class 1 was 'dog', is None", False),
    ],
)
def test_the_first_difference_is_named(before, now, difference, other_numbers):
    assert first_difference(before, now) == difference
    assert first_difference(None, now) == first_difference(before, None) == ""
    assert renumbered(before, now) == other_numbers


def loader_of(root):
    return build_eval_loader(DataConfig(source="folder", path=str(root), num_workers=1), batch_size=4)


def renamed(root, out, **names):
    shutil.copytree(root, out)
    for split in ("train", "val"):
        for old, new in names.items():
            (out / split / old).rename(out / split / new)
    return out


def test_a_run_is_not_continued_with_other_class_names(tmp_path):
    run_dir, loader = RunDirectory(tmp_path), loader_of(make_folder(tmp_path / "in"))
    facts = describe_data(loader)
    other = facts | {"class_names": ["class_0", "class_1", "zebra"]}
    run_dir.check_data(facts, ())
    with pytest.raises(ValueError, match=r"class_names: number 2 was \['class_2'\], is \['zebra'\]"):
        run_dir.check_data(other, ())
    run_dir.check_data(other, ("data.fingerprint",))
    run_dir.check_data(other, ())
    loader.close()


def test_a_run_that_was_started_before_names_were_kept_goes_on(tmp_path):
    loader = loader_of(make_folder(tmp_path / "in"))
    facts = describe_data(loader)
    (tmp_path / "data.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "class_names"}))
    RunDirectory(tmp_path).check_data(facts, ())
    assert json.loads((tmp_path / "data.json").read_text())["class_names"] == ["class_0", "class_1", "class_2"]
    loader.close()


def test_a_model_is_not_scored_on_its_classes_in_another_order(tmp_path, capsys):
    folder = make_folder(tmp_path / "in")
    models = {"": torch.nn.ModuleDict({"head": torch.nn.Linear(2, 3)})}

    def check(root, **config):
        loader = loader_of(root)
        data = DataConfig(source="folder", path=str(root))
        cfg = EvalConfig(checkpoint="x.pt", model=ModelConfig(name="mambavision_nano"), data=data)
        check_classes({"config": {"num_classes": 3, **config}}, models, loader, cfg, WORLD)
        loader.close()

    trained = ["class_0", "class_1", "class_2"]
    check(folder, class_names=trained)
    check(folder)  # a checkpoint that does not know its names
    assert capsys.readouterr().out == ""
    check(renamed(folder, tmp_path / "renamed", class_2="zebra"), class_names=trained)
    assert "class 2 was 'class_2', is 'zebra'" in capsys.readouterr().out
    with pytest.raises(ValueError, match="class 0 was 'class_0', is 'class_1'"):
        check(renamed(folder, tmp_path / "reordered", class_0="zebra"), class_names=trained)


def test_a_val_file_of_other_classes_than_the_train_file_beside_it_is_refused(tmp_path, capsys):
    """As when one of both was written from a part of the classes, and the numbers of the other shifted."""
    folder = make_folder(tmp_path / "in")
    make_betons(folder, tmp_path)
    shutil.rmtree(folder / "val" / "class_0")
    write_beton(list_folder(folder / "val"), tmp_path / "val.beton", WriteSettings(), num_workers=1)
    with pytest.raises(ValueError, match="class 0 was 'class_0', is 'class_1'"):
        build_eval_loader(DataConfig(path=str(tmp_path), num_workers=1), batch_size=4)
    assert check_data.main([str(tmp_path), "--split", "val", "--num-workers", "1"]) == 1
    assert "numbers its classes otherwise" in capsys.readouterr().out.replace("\n", " ")


def test_a_val_file_of_ffcvs_own_writer_is_taken_beside_a_train_file_of_ours(tmp_path):
    """It has no manifest, so that its classes have numbers for names."""
    make_betons(make_folder(tmp_path / "in"), tmp_path)
    manifest_path(tmp_path / "val.beton").unlink()
    loader = build_eval_loader(DataConfig(path=str(tmp_path), num_workers=1), batch_size=4)
    assert (loader.num_classes, loader.class_names) == (3, None)
    loader.close()
