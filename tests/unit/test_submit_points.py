"""Which points a sweep has, what they are called, and that both ways of running a sweep agree on it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mambavision.cluster import points
from mambavision.compose import compose_train_config
from mambavision.config_checks import ConfigError
from mambavision.run_dir import run_directory

TINY = ["experiment=tiny", "logger=jsonl"]


def test_a_sweep_is_the_product_of_its_values_in_the_order_given() -> None:
    names = [p.name for p in points.expand([*TINY, "optimizer.lr=1e-3,2e-3", "seed=0,1"])]
    assert names == [f"optimizer.lr={lr},seed={seed}" for lr in ("0.001", "0.002") for seed in (0, 1)]


@pytest.mark.slow
def test_each_point_has_its_own_directory_with_and_without_a_run_name() -> None:
    for extra in ([], ["run_name=lr"]):
        directories = [run_directory(p.cfg) for p in points.expand([*TINY, *extra, "optimizer.lr=1e-3,2e-3,5e-3"])]
        assert len(set(directories)) == 3
    assert directories[0] == "runs/lr/optimizer.lr=0.001"


@pytest.mark.slow
@pytest.mark.parametrize("swept", ["trainer.precision=fp32,bf16", "trainer=cpu,a100x8", "guard.max_rollbacks=0,1"])
def test_points_that_differ_in_nothing_that_names_a_run_have_their_own_directories_too(swept: str) -> None:
    found = points.expand([*TINY, swept])
    assert [run_directory(p.cfg).split("/", 2)[2] for p in found] == [p.name for p in found]
    assert len({run_directory(p.cfg) for p in found}) == 2


@pytest.mark.slow
def test_a_point_is_one_plain_command_that_gives_the_same_run() -> None:
    for point in points.expand([*TINY, "run_name=a b", "model.architecture.depths=[1,1,2,2],[1,1,1,1]", "seed=3"]):
        again = compose_train_config(list(point.overrides))
        assert again == point.cfg
        assert again.logger.group == "a b" and again.logger.tags[0].startswith("model.architecture.depths=[1,1,")


@pytest.mark.slow
def test_a_multirun_job_is_placed_where_the_submitter_places_it() -> None:
    words = [*TINY, "run_name=x", "optimizer.lr=1e-3,2e-3", "optimizer=lamb,adamw"]
    for point in points.expand(words):
        job = [*TINY, "run_name=x", f"optimizer.lr={point.cfg.optimizer.lr}", f"optimizer={point.cfg.optimizer.name}"]
        cfg = points.place_in_multirun(compose_train_config(job), ["-m", *words], job, [])
        assert cfg == point.cfg


@pytest.mark.slow
def test_a_sweep_file_gives_its_values_and_the_command_line_wins() -> None:
    assert [p.cfg.seed for p in points.expand([*TINY, "sweep=seeds"])] == [0, 1, 2]
    assert [p.cfg.seed for p in points.expand([*TINY, "sweep=seeds", "seed=7,8"])] == [7, 8]


def test_a_sweep_file_without_m_is_not_one_run_of_the_defaults() -> None:
    with pytest.raises(ConfigError, match="sweep=seeds names the points of a sweep, which needs -m"):
        points.single([*TINY, "sweep=seeds"])


def test_run_name_is_not_varied() -> None:
    """Its several values made one directory, named by the object that Hydra makes of them."""
    with pytest.raises(ConfigError, match="run_name=a,b gives several values: run_name names a sweep"):
        points.expand([*TINY, "run_name=a,b"])
    with pytest.raises(ConfigError, match="run_name names a sweep"):
        points.place_in_multirun(
            compose_train_config([*TINY, "run_name=a"]), ["run_name=a,b", "-m"], ["run_name=a"], []
        )


def test_every_wrong_point_is_named_and_none_is_returned() -> None:
    with pytest.raises(ConfigError, match=r"2 of 3 points cannot run:\noptimizer.lr=abc: .*\noptimizer.lr=-1: "):
        points.expand([*TINY, "optimizer.lr=abc,-1,1e-3"])


def test_several_values_without_m_are_answered_with_m() -> None:
    told = (
        r"""optimizer.lr is given several values: a sweep needs -m; .* with a comma is written 'optimizer.lr="a,b"'"""
    )
    with pytest.raises(ConfigError, match=told):
        points.single([*TINY, "optimizer.lr=1e-3,2e-3"])


def test_a_leading_tilde_is_the_home_directory() -> None:
    assert points.single(["data=folder", "data.path=~/set"]).cfg.data.path == str(Path.home() / "set")


@pytest.mark.parametrize("path", ["/data/(old) x", "/[a]", "/{a}", "/~a", "/it's", '/say "a"', "/a=b", "/données"])
def test_a_path_is_taken_as_it_was_typed(path: str) -> None:
    assert points.single(["data=folder", f"data.path={path}"]).cfg.data.path == path
    assert [p.cfg.data.path for p in points.expand(["data=folder", f"data.path={path}", "seed=1,2"])] == [path] * 2


@pytest.mark.parametrize("path", ["/data/(old), x", "/é,b"])
def test_the_message_about_a_value_that_needs_quotes_has_the_word_to_type(path: str) -> None:
    with pytest.raises(ConfigError) as error:
        points.single(["data=folder", f"data.path={path}"])
    (word,) = shlex.split(str(error.value).rsplit("for the shell; type ")[1])
    assert points.single(["data=folder", word]).cfg.data.path == path


def test_a_long_name_is_cut_and_stays_distinct() -> None:
    settings = [f"a.b{i}=1234567890" for i in range(20)]
    one, other = points.point_name(settings), points.point_name([*settings, "c=1"])
    assert len(one) <= 120 and one != other and one[:100] == other[:100]
