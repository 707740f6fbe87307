from dataclasses import fields

import pytest
import torch

from latentflow.shapes import Condition, image_mean, moved_about, per_image


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


def condition_of(*labels: int) -> Condition:
    """All fields, each holding its image's label."""
    values = torch.tensor(labels, dtype=torch.float32).reshape(-1, 1, 1, 1)
    shapes = {"masked_latents": (4, 2, 2), "mask": (1, 2, 2), "class_fractions": (3, 2, 2), "input": (3, 2, 2)}
    spatial = {name: values.expand(-1, *shape) for name, shape in shapes.items()}
    rows = {name: values.flatten(1).expand(-1, 2) for name in ("columns", "augmentation")}
    numbers = {name: values.flatten() for name in ("span", "guidance")}
    return Condition(torch.tensor(labels), **spatial, **rows, **numbers)


def test_condition_selects_and_joins_the_rows_of_every_field():
    def same(one: Condition, other: Condition) -> bool:
        return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Condition))

    condition = condition_of(4, 5, 6)
    spatial, rows = ["masked_latents", "mask", "class_fractions", "input"], ["columns", "augmentation"]
    assert condition.names == ["labels", *spatial, *rows, "span", "guidance"] == [f.name for f in fields(Condition)]
    assert same(condition.select(torch.tensor([2, 0])), condition_of(6, 4))
    assert same(condition.select(torch.tensor([False, True, True])), condition_of(5, 6))
    assert same(condition.concatenate(condition_of(9)), condition_of(4, 5, 6, 9))
    assert not same(condition, condition_of(4, 5, 7))
    moved = condition.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in condition.names)


def test_missing_conditions_stay_none():
    labels_only, empty = Condition(torch.tensor([4, 5])), Condition()
    assert labels_only.select(torch.tensor([1])).names == labels_only.to("meta").names == ["labels"]
    assert empty.names == empty.select(torch.tensor([0])).names == empty.concatenate(Condition()).names == []
    with pytest.raises(ValueError, match=r"cannot join a condition with \[\] and one with \['labels'\]"):
        empty.concatenate(labels_only)
    with pytest.raises(ValueError, match="class_fractions"):
        labels_only.concatenate(condition_of(4, 5))


def test_numbers_of_16_bits_are_moved_without_a_change():
    values = torch.arange(40_000, 40_024, dtype=torch.int32).to(torch.uint16).reshape(2, 3, 2, 2)
    moved = moved_about(lambda x: x.flip(-1).index_select(0, torch.tensor([1, 0])), values)
    expected = values.int().flip(-1)[[1, 0]]
    assert moved.dtype == torch.uint16
    assert torch.equal(moved.int(), expected)
    assert torch.equal(moved_about(lambda *x: torch.cat(x), values, values).int(), torch.cat([values.int()] * 2))
