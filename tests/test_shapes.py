import pytest
import torch

from latentflow.shapes import Condition, image_mean, per_image


def test_per_image_multiplies_whole_images_even_where_the_width_equals_the_batch():
    x = torch.ones(4, 3, 5, 4)
    scaled = per_image(torch.arange(4.0), x) * x
    assert torch.equal(scaled.mean((1, 2, 3)), torch.arange(4.0))


def test_per_image_takes_device_and_dtype_of_the_images():
    assert per_image(torch.ones(2, dtype=torch.float64), torch.zeros(2, 1, 1, 1)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_per_image_refuses_another_shape(shape):
    with pytest.raises(ValueError, match=r"one value per image, shape \[2\]"):
        per_image(torch.ones(shape), torch.zeros(2, 1, 1, 1))


def test_image_mean_keeps_the_batch():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert image_mean(x).tolist() == [5.5, 17.5]


def test_condition_selects_and_joins_rows():
    condition = Condition(torch.tensor([4, 5, 6]))
    assert condition.select(torch.tensor([2, 0])).labels.tolist() == [6, 4]
    assert condition.select(torch.tensor([False, True, True])).labels.tolist() == [5, 6]
    assert condition.concatenate(Condition(torch.tensor([9]))).labels.tolist() == [4, 5, 6, 9]


def test_condition_without_labels_stays_so():
    empty = Condition()
    assert empty.select(torch.tensor([0])).labels is None
    assert empty.concatenate(Condition()).labels is None
    with pytest.raises(ValueError, match="with labels and one without"):
        empty.concatenate(Condition(torch.tensor([1])))
