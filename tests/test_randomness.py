import torch

from latentflow.randomness import ImageRandom, derive_seed


def test_an_image_draws_the_same_numbers_in_any_batch():
    together = ImageRandom.at(7, "step", [3, 10, 4])
    alone = ImageRandom.at(7, "step", torch.tensor([10]))
    assert torch.equal(together.uniform()[1:2], alone.uniform())
    assert torch.equal(together.normal(4, 2, 2)[1:2], alone.normal(4, 2, 2))


def test_seed_purpose_and_position_each_give_another_stream():
    draws = [
        ImageRandom.at(*who).uniform().item()
        for who in ((0, "step", [0]), (1, "step", [0]), (0, "flip", [0]), (0, "step", [1]))
    ]
    assert len(set(draws)) == 4


def test_derived_seeds_tell_numbers_from_names_and_do_not_run_together():
    seeds = {derive_seed(1, 23), derive_seed(12, 3), derive_seed("1", 23), derive_seed(1, "23"), derive_seed(123)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_derived_seed_never_changes():
    """Pictures and resumed runs depend on it: a new value here breaks every model folder's seeds."""
    assert derive_seed("sample", 0) == 9041044525071353427


def test_normal_numbers_are_standard_normal():
    draws = ImageRandom(range(64)).normal(4, 16, 16)
    assert draws.dtype == torch.float32
    # 65,536 draws: the mean is within 4 standard errors (1/256) of 0, the variance (error 0.0055) of 1
    assert abs(draws.mean()) < 4 / 256
    assert abs(draws.var() - 1) < 4 * 0.0055


def test_uniform_numbers_fill_the_unit_interval():
    draws = ImageRandom(range(200)).uniform(50)
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 * 0.2887 / 100
