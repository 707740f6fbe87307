"""Precision, recall, density and coverage: published values, sets on a line, blocks."""

from __future__ import annotations

import pytest
import torch

from latentflow.errors import ConfigError, DataError
from latentflow.metrics import neighbours as module
from latentflow.metrics.names import NEIGHBOUR_SCORES
from latentflow.metrics.neighbours import Neighbours, neighbour_scores, squared_radii


def on_a_line(*points: float) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.float32)[:, None]


def plain(generated: torch.Tensor, real: torch.Tensor, k: int, k_density: int) -> tuple[torch.Tensor, ...]:
    """The definitions, with whole distance matrices."""

    def radius(x, k):
        return torch.cdist(x, x).fill_diagonal_(torch.inf).kthvalue(k, dim=1).values

    distances = torch.cdist(generated, real)
    dense = distances <= radius(real, k_density)
    return (
        (distances <= radius(real, k)).any(1).double(),
        (distances <= radius(generated, k)[:, None]).any(0).double(),
        dense.sum(1) / k_density,
        dense.any(0).double(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [3, 5])
def test_published_precision_and_recall(metric_values, k, dtype):
    generated, real = (metric_values[f"inputs/{name}"].to(dtype) for name in ("gen", "real"))
    found = neighbour_scores(generated, real, k=k)
    for name in ("precision", "recall"):
        expected = metric_values[f"outputs/prc_k{k}_double_{name}"].item()
        assert getattr(found, name) == pytest.approx(expected, abs=1e-6)


def test_published_radii(metric_values):
    for name in ("gen", "real"):
        found = squared_radii(metric_values[f"inputs/{name}"].double(), 3)[:, -1].sqrt()
        torch.testing.assert_close(found, metric_values[f"outputs/prc_radius_k3_{name}"], rtol=1e-12, atol=1e-12)


def test_by_hand():
    """Real at 0, 1, 3, 7 with radii 1, 1, 2, 4 (k = 1); generated at 1.5, 12, 13 with radii 10.5, 1, 1."""
    found = neighbour_scores(on_a_line(1.5, 12, 13), on_a_line(0, 1, 3, 7), k=1, k_density=1)
    assert found.precision_of.tolist() == [1, 0, 0]
    assert found.recall_of.tolist() == [1, 1, 1, 1]
    assert found.density_of.tolist() == [2, 0, 0]  # within the radii of 1 and 3
    assert found.coverage_of.tolist() == [0, 1, 1, 0]
    assert (found.precision, found.recall, found.density, found.coverage) == (1 / 3, 1, 2 / 3, 0.5)


def test_the_radius_belongs_to_the_inside():
    """Radii are 1, and the generated image lies exactly 1 from the last real one."""
    found = neighbour_scores(on_a_line(4, 100), on_a_line(0, 1, 2, 3), k=1, k_density=1)
    assert found.precision_of.tolist() == [1, 0]
    assert found.coverage_of.tolist() == [0, 0, 0, 1]


def test_density_and_coverage_have_their_own_number_of_neighbours():
    """With k = 2 the radii of 0, 1, 3, 7 are 3, 2, 3, 6."""
    found = neighbour_scores(on_a_line(5, 20, 30), on_a_line(0, 1, 3, 7), k=1, k_density=2)
    assert found.precision_of.tolist() == [1, 0, 0]
    assert found.density_of.tolist() == [1, 0, 0]  # 3 and 7, divided by k
    assert found.coverage_of.tolist() == [0, 0, 1, 1]


def test_equal_sets_and_far_sets():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    same = neighbour_scores(x, x.clone())
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = neighbour_scores(x + 100, x)
    assert [getattr(far, score) for score in NEIGHBOUR_SCORES] == [0, 0, 0, 0]


@pytest.mark.parametrize("block", [1, 7, 64, 2048])
def test_blocks_do_not_show(monkeypatch, block):
    generator = torch.Generator().manual_seed(1)
    generated, real = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (90, 61))
    monkeypatch.setattr(module, "_BLOCK", block)
    found = neighbour_scores(generated, 1.2 * real, k=3, k_density=4)
    for values, expected in zip(vars(found).values(), plain(generated, 1.2 * real, 3, 4), strict=True):
        assert torch.equal(values, expected)


def test_a_common_offset_costs_no_digits():
    generator = torch.Generator().manual_seed(1)
    generated, real = (torch.randn(n, 5, generator=generator).round(decimals=1) for n in (90, 61))
    offset, expected = 2.0**12, neighbour_scores(generated, real)
    shifted = neighbour_scores((generated + offset), (real + offset))
    assert shifted.precision == pytest.approx(expected.precision, abs=0.02)
    assert shifted.recall == pytest.approx(expected.recall, abs=0.02)


def test_resampling_weights_the_contributions():
    values = [torch.tensor(x, dtype=torch.float64) for x in ([1, 0, 1], [1, 0], [0.2, 0, 2], [1, 1])]
    found = Neighbours(*values)
    counts = torch.tensor([[3, 0, 0], [0, 2, 1]], dtype=torch.float64)
    assert found.resampled("precision")(counts).tolist() == pytest.approx([1, 1 / 3])
    assert found.resampled("density")(counts).tolist() == pytest.approx([0.2, 2 / 3])


def test_refusals():
    x = torch.randn(6, 2)
    with pytest.raises(DataError, match="5 neighbours"):
        neighbour_scores(x[:5], x)
    with pytest.raises(DataError, match="7 neighbours"):
        neighbour_scores(x, x, k=7)
    with pytest.raises(ConfigError, match="at least one"):
        neighbour_scores(x, x, k=0)
    with pytest.raises(DataError, match="2 features and the others 3"):
        neighbour_scores(x, torch.randn(6, 3))
    with pytest.raises(DataError, match="6 of 6 real"):
        neighbour_scores(x, x * torch.nan)
