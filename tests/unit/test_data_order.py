"""The order of samples: a pure function, whoever asks and wherever a run is taken up again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import keyed_random
from data.order import EpochPlan, epoch_order, eval_indices, resolution_at

SEEDS = st.integers(0, 2**32)


@st.composite
def batch_shapes(draw):
    """(num_samples, micro, world, accumulation): a global batch that divides, and at least one step of samples."""
    micro, world, accumulation = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 3))
    samples = draw(st.integers(micro * world * accumulation, 200))
    return samples, micro, world, accumulation


@given(batch_shapes(), SEEDS, st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_each_step_holds_the_same_micro_batches_at_any_world_size(shape, seed, epoch):
    samples, micro, world, accumulation = shape
    global_batch = micro * world * accumulation
    alone = EpochPlan(samples, global_batch, micro).rank_order(seed, epoch)
    steps = samples // global_batch
    micros = alone.reshape(steps, world, accumulation, micro)
    for rank in range(world):
        plan = EpochPlan(samples, global_batch, micro, rank, world)
        np.testing.assert_array_equal(plan.rank_order(seed, epoch).reshape(steps, accumulation, micro), micros[:, rank])


@given(batch_shapes(), SEEDS, st.data())
@settings(max_examples=60, deadline=None)
def test_starting_at_a_step_continues_as_if_never_stopped(shape, seed, data):
    samples, micro, world, accumulation = shape
    plan = EpochPlan(samples, micro * world * accumulation, micro, world - 1, world)
    first = data.draw(st.integers(0, plan.steps_per_epoch))
    whole = plan.rank_order(seed, 7)
    np.testing.assert_array_equal(plan.rank_order(seed, 7, first), whole[first * micro * accumulation :])


@given(st.integers(1, 500), SEEDS, st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation(samples, seed, epoch):
    np.testing.assert_array_equal(np.sort(epoch_order(samples, seed, epoch)), np.arange(samples))


def test_neighbouring_seeds_and_epochs_share_no_order():
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch)) for seed in range(6) for epoch in range(6)}
    assert len(set(orders.values())) == 36


def test_the_order_is_this_one_for_ever():
    """A run resumed with another version of anything must see the samples it would have seen."""
    assert epoch_order(10, seed=3, epoch=2).tolist() == [8, 3, 1, 6, 7, 9, 2, 5, 4, 0]
    assert keyed_random.sample_key(1, 2, 3) == 11040400553240503415


def test_array_and_scalar_hash_agree():
    values = np.array([0, 1, 5, 2**40, 2**63], dtype=np.uint64)
    key = keyed_random.domain_key(11, keyed_random.ORDER, 4)
    assert keyed_random.fold_array(key, values).tolist() == [keyed_random.fold(key, int(v)) for v in values]


@given(st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_evaluation_shares_cover_each_sample_once(samples, world):
    shares = np.concatenate([eval_indices(samples, rank, world) for rank in range(world)])
    np.testing.assert_array_equal(np.sort(shares), np.arange(samples))


def test_repeated_augmentation_repeats_images_in_a_step_with_other_keys():
    plan = EpochPlan(100, 12, 4, repeats=3)
    order = plan.order(0, 0).reshape(plan.steps_per_epoch, 12)
    for step in order:
        images, counts = np.unique(step % 100, return_counts=True)
        assert (counts == 3).all() and len(images) == 4
        assert len(set(step)) == 12, "each repetition has its own number, so its own key"
    assert len(set(order.reshape(-1) % 100)) == 4 * plan.steps_per_epoch


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (dict(num_samples=100, global_batch_size=10, micro_batch_size=4), "take 8 or 12"),
        (dict(num_samples=100, global_batch_size=8, micro_batch_size=4, world_size=3), "take 12$"),
        (dict(num_samples=5, global_batch_size=8, micro_batch_size=4), "trainer.global_batch_size=4"),
        (dict(num_samples=50, global_batch_size=8, micro_batch_size=4, repeats=3), "repeated_augmentation=3"),
    ],
)
def test_batches_that_do_not_divide_are_answered_with_ones_that_do(arguments, advice):
    with pytest.raises(ValueError, match=advice):
        EpochPlan(**arguments)


def test_progressive_resolution_ramps_in_steps_of_32_and_stays():
    ramp = (128, 224, 2, 8)
    sizes = [resolution_at(epoch, 224, ramp) for epoch in range(10)]
    assert sizes == [128, 128, 128, 128, 160, 192, 192, 192, 224, 224]
    assert resolution_at(5, 224) == 224
    with pytest.raises(ValueError, match=r"\[160,224,0,250\]"):
        resolution_at(0, 224, (128, 224))


@pytest.mark.parametrize(
    "micro, advice", [(8, "take trainer.global_batch_size=96 or smaller"), (64, "fewer ranks (4)")]
)
def test_a_set_smaller_than_a_step_is_told_a_batch_that_it_fills(micro: int, advice: str):
    with pytest.raises(ValueError, match="has 100 images") as error:
        EpochPlan(100, 256, micro, 0, 4)
    assert advice in str(error.value)
