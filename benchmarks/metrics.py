"""Seconds and memory of the arithmetic of scores, against the same in plain numpy on whole arrays.

    statistics    mean and covariance, streamed in batches of 256; numpy: float64 copy, mean, cov
    neighbours    precision, recall, density, coverage by blocks; numpy: three whole distance matrices
    intervals     the standard error of a Fréchet distance by what each image contributes; beside it, by --resamples

Both sides take the same float32 features, in turn; that their results agree is measured too. Memory is the peak above
what the process held before (Linux only; with --device cuda it is the host's). numpy's threads are set by
OMP_NUM_THREADS, torch's by --threads.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from measuring import REST, Stopwatch, median_and_quartiles, seconds

from latentflow.metrics.neighbours import neighbour_scores
from latentflow.metrics.resampling import bootstrap, interval_over_images
from latentflow.metrics.scores import frechet_contributions, frechet_distance, resampled_frechet
from latentflow.metrics.statistics import FeatureStatistics

OURS, PLAIN = "latentflow", "plain numpy"
K, K_DENSITY, BATCH = 3, 5, 256
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=50_000, help="of the statistics")
    parser.add_argument("--num-neighbours", type=int, default=10_000, help="images in each set of the neighbours")
    parser.add_argument("--dim", type=int, default=2048, help="features of an image")
    parser.add_argument("--resamples", type=int, default=10, help="beside the interval over images")
    parser.add_argument("--device", default="cpu", help="of our side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; default: torch's choice")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    measuring.setup(options.device, options.threads)
    device = torch.device(options.device)
    statistics = measure_statistics(options.num_images, options.dim, options.rounds, device)
    neighbours = measure_neighbours(options.num_neighbours, options.dim, options.rounds, device)
    intervals = measure_intervals(options.num_images, options.dim, options.resamples, device)
    results = {
        "dim": options.dim,
        "rounds": options.rounds,
        "statistics": {"num_images": options.num_images, **statistics},
        "neighbours": {"num_images": options.num_neighbours, "k": [K, K_DENSITY], **neighbours},
        "intervals": {"num_images": options.num_images, "resamples": options.resamples, **intervals},
    }
    for name in ("statistics", "neighbours", "intervals"):
        print_table(f"{name}, {results[name]['num_images']:,} images of {options.dim} features", results[name])
    measuring.write_results("metrics", device, results, options.results)
    return results


def measure_statistics(num_images: int, dim: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Both ways to mean and covariance."""
    features = torch.randn(num_images, dim, generator=torch.Generator().manual_seed(0)).relu_()
    sides = {OURS: lambda: streamed(features, device), PLAIN: lambda: plain_statistics(features.numpy())}
    return measure(sides, rounds)


def measure_neighbours(num_images: int, dim: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Both ways to the scores of neighbours, of two sets that are not quite alike."""
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(num_images, dim, generator=generator).relu_() for _ in range(2))
    generated *= 0.98
    sides = {
        OURS: lambda: by_blocks(generated, real, device),
        PLAIN: lambda: plain_neighbours(generated.numpy(), real.numpy()),
    }
    return measure(sides, rounds)


def measure_intervals(num_images: int, dim: int, resamples: int, device: torch.device) -> dict[str, Any]:
    """Both ways to the standard error of a Fréchet distance, of two sets that are not quite alike."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(dim, dim, generator=generator) / dim**0.5
    real, generated = ((torch.randn(num_images, dim, generator=generator) @ mixed).relu_() for _ in range(2))
    reference = FeatureStatistics.of(real, device)
    generated = 1.2 * generated

    def over_images() -> list[np.ndarray]:
        statistics = FeatureStatistics.of(generated, device)
        value = frechet_distance(statistics, reference)
        contributions = frechet_contributions(generated, statistics, reference)
        return [np.array([interval_over_images(contributions, value).standard_error])]

    def resampled() -> list[np.ndarray]:
        scores = resampled_frechet(generated, reference, device=device)
        return [np.array([bootstrap(scores, num_images, estimate=0.0, num=resamples).standard_error])]

    return measure({OURS: over_images, f"{resamples} resamples": resampled}, 1)


def streamed(features: torch.Tensor, device: torch.device) -> list[np.ndarray]:
    """Mean and covariance, batch by batch."""
    statistics = FeatureStatistics(features.shape[1], device)
    for batch in features.split(BATCH):
        statistics.update(batch)
    return [statistics.mean.cpu().numpy(), statistics.covariance.cpu().numpy()]


def plain_statistics(features: np.ndarray) -> list[np.ndarray]:
    """Mean and covariance of the whole array."""
    features = features.astype(np.float64)
    return [features.mean(0), np.cov(features, rowvar=False)]


def by_blocks(generated: torch.Tensor, real: torch.Tensor, device: torch.device) -> list[np.ndarray]:
    """Precision, recall, density and coverage."""
    found = neighbour_scores(generated, real, k=K, k_density=K_DENSITY, device=device)
    return [np.array([found.precision, found.recall, found.density, found.coverage])]


def plain_neighbours(generated: np.ndarray, real: np.ndarray) -> list[np.ndarray]:
    """The same by the definitions, with whole matrices of distances."""
    among_real, among_generated = (np.partition(distances(x, x), (K, K_DENSITY), axis=1) for x in (real, generated))
    radii, dense_radii, generated_radii = among_real[:, K], among_real[:, K_DENSITY], among_generated[:, K, None]
    across = distances(generated, real)
    precision, recall = (across <= radii).any(1).mean(), (across <= generated_radii).any(0).mean()
    dense = across <= dense_radii
    return [np.array([precision, recall, dense.sum(1).mean() / K_DENSITY, dense.any(0).mean()])]


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[N, D] and [M, D] => [N, M]; the distance of an image to itself comes first when they are sorted."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * (x @ y.T)
    return np.sqrt(np.maximum(squares, 0))


def measure(sides: Mapping[str, Callable[[], list[np.ndarray]]], rounds: int) -> dict[str, Any]:
    """Time and memory of each side, taken in turn, and the ratio of the other to ours round by round."""
    stopwatch = Stopwatch(torch.device("cpu"))
    laps: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    memory: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for _ in range(rounds):
        for name, compute in sides.items():
            results.pop(name, None)
            gc.collect()
            before = reset_peak()
            stopwatch.lap()
            results[name] = compute()
            laps[name].append(seconds([stopwatch.lap()], REST)[0])
            memory[name].append((peak() - before) / MIB)
    (other,) = sides.keys() - {OURS}
    difference = max(np.abs(x - y).max() for x, y in zip(results[OURS], results[other], strict=True))
    return {
        "seconds": {name: median_and_quartiles(np.array(values)) for name, values in laps.items()},
        "peak_mib": {name: max(values) for name, values in memory.items()},
        "times_faster": median_and_quartiles(np.array(laps[other]) / np.array(laps[OURS])),
        "times_less_memory": max(memory[other]) / max(*memory[OURS], 1.0),
        "largest_difference": float(difference),
    }


def reset_peak() -> int:
    """Forget the largest memory so far; returns the bytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes held since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def print_table(title: str, figures: Mapping[str, Any]) -> None:
    """One part of the results, for people."""
    print(title)
    for name in figures["seconds"]:
        time = figures["seconds"][name]["median"]
        print(f"  {name:12} {time['wall']:8.2f} s wall {time['cpu']:8.2f} s CPU {figures['peak_mib'][name]:8.0f} MiB")
    ratio = figures["times_faster"]["median"]
    print(f"  times faster {ratio['wall']:.2f} wall, {ratio['cpu']:.2f} CPU")
    print(f"  times less memory {figures['times_less_memory']:.1f}")
    print(f"  largest difference {figures['largest_difference']:.1e}")


if __name__ == "__main__":
    main()
