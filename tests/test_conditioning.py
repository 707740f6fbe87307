import pytest
import torch
from pydantic import ValidationError

from latentflow.conditioning import Conditioning
from latentflow.errors import ConfigError
from latentflow.randomness import ImageRandom

ANIMALS = Conditioning(class_names=["cat", "dog", "owl"], label_dropout=0.25)


def test_the_null_label_is_the_index_behind_the_last_class():
    assert ANIMALS.null_label == 3
    assert ANIMALS.null(2, "cpu").labels.tolist() == [3, 3]


def test_labels_are_dropped_one_by_one_at_the_given_rate():
    labels = torch.arange(4000) % 3
    told = ANIMALS.for_training(labels, ImageRandom(range(4000)), "cpu").labels
    dropped = told == ANIMALS.null_label
    assert torch.equal(told[~dropped], labels[~dropped])
    # binomial: standard error sqrt(0.25 * 0.75 / 4000) = 0.0068
    assert abs(dropped.double().mean() - 0.25) < 4 * 0.0068


def test_training_and_sampling_build_the_same_condition():
    kept = Conditioning(class_names=["cat", "dog"], label_dropout=0.0)
    labels = torch.tensor([1, 0, 1])
    trained = kept.for_training(labels, ImageRandom(range(3)), "cpu")
    assert torch.equal(trained.labels, kept.for_labels(labels.tolist(), "cpu").labels)


def test_an_unconditional_model_has_empty_conditions():
    nothing = Conditioning()
    assert nothing.for_training(None, ImageRandom([0]), "cpu").labels is None
    assert nothing.null(3, "cpu").labels is None
    assert not nothing.can_guide


def test_guidance_needs_a_trained_null_label():
    assert ANIMALS.can_guide
    assert not Conditioning(class_names=["cat", "dog"], label_dropout=0.0).can_guide


@pytest.mark.parametrize(("given", "index"), [("dog", 1), (2, 2), ("0", 0), (" owl ", 2)])
def test_a_class_is_found_by_name_or_index(given, index):
    assert ANIMALS.class_index(given) == index


@pytest.mark.parametrize(
    ("given", "message"),
    [("dgo", "did you mean 'dog'"), (3, "classes 0 to 2"), (-1, "classes 0 to 2"), ("1.5", "no class is named '1.5'")],
)
def test_a_class_that_does_not_exist_is_refused_with_the_nearest(given, message):
    with pytest.raises(ConfigError, match=message):
        ANIMALS.class_index(given)


def test_an_unconditional_model_has_no_class_to_ask_for():
    with pytest.raises(ConfigError, match="unconditional"):
        Conditioning().class_index("cat")


def test_class_names_must_differ():
    with pytest.raises(ValidationError, match="given twice: cat"):
        Conditioning(class_names=["cat", "dog", "cat"])


def test_a_number_is_an_index_where_classes_are_called_by_numbers():
    """A text is a name first: folders 1, 0, 2 are classes 0, 1, 2."""
    digits = Conditioning(class_names=["1", "0", "2"])
    assert [digits.class_index(index) for index in (0, 1, 2)] == [0, 1, 2]
    assert [digits.class_index(name) for name in ("0", "1", "2")] == [1, 0, 2]
