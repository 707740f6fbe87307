"""Does a judge rank images as the eye does? Distances, recall and class accuracy of sets whose order is known.

    real             photographs that are not in the reference
    reconstructed    the same, encoded and decoded
    trained          drawn by the model with its own preset and guidance 1
    few steps        the same seeds with a few Euler steps
    untrained        the same seeds by a network of the same sizes with random weights

The distances must rise in this order, each by more than two standard errors. Guidance is measured as well: where the
model knows classes, class accuracy must rise from guidance 1 to guidance 2. All sets have equally many images, as a
distance depends on their number.

    python benchmarks/judge_ranking.py --judge judges/cifar10 --model runs/cifar10 --data cifar10/train --num 5000
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import measuring
import torch
from torch import Tensor, nn

from latentflow.data.sources.images import open_images
from latentflow.evaluation.class_accuracy import class_accuracy, require_judged
from latentflow.evaluation.drawn_set import plan_set
from latentflow.evaluation.real_images import image_features
from latentflow.evaluation.shards import Columns, Work
from latentflow.metrics.feature_scores import Scoring, feature_scores
from latentflow.metrics.features.extractors import JudgeFeatures, open_features
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime, open_runtime

ORDER = ("real", "reconstructed", "trained", "few steps", "untrained")
METRICS = ("fid", "precision", "recall")
SIGMAS = 2.0  # a difference counts if it exceeds this many standard errors of it


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, help="folder of `latentflow train-features`, or other features")
    parser.add_argument("--model", required=True, help="a model of the same images")
    parser.add_argument("--data", required=True, help="the images")
    parser.add_argument("--num", type=int, default=1000, help="images of each set, and of the reference")
    parser.add_argument("--few-steps", type=int, default=4, help="Euler steps of the set with few")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's choice")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    measuring.setup(options.device, options.threads)
    runtime = open_runtime(options.device)
    sets = measure(options, runtime)
    results = {**vars(options), "results": None, "sets": sets, "ranking": ranking(sets)}
    print_table(results)
    measuring.write_results("judge_ranking", runtime.device, results, options.results)
    return results


def measure(options: argparse.Namespace, runtime: Runtime) -> dict[str, dict[str, float]]:
    """The scores of every set, by name."""
    flow = FlowModel.from_pretrained(options.model, runtime=runtime)
    size = flow.config.image_size
    extractor = open_features(options.judge, autoencoder=flow.autoencoder, image_size=size, device=runtime.device)
    source = open_images(options.data, size)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(options.seed)).tolist()
    parts = [order[: options.num], order[options.num : 2 * options.num]]

    def work(name: str) -> Any:
        return image_progress(name, options.num)

    def read(name: str, rows: list[int], change: Callable[..., Any] | None = None) -> Columns:
        with work(name) as count:
            how = Work(batch_size=options.batch_size, on_images=count)
            return image_features(source, rows, extractor, plan={}, work=how, change=change)

    def reconstruct(pixels: Tensor, rows: list[int]) -> tuple[Tensor, Columns]:
        return torch.cat([flow.autoencoder.reconstruct(part) for part in flow.autoencoder.slices(pixels)]), {}

    def draw(name: str, model: FlowModel, **preset: Any) -> Columns:
        with work(name) as count:
            how = Work(batch_size=options.batch_size, on_images=count)
            return plan_set(model, seed=options.seed, preset=preset).draw(extractor, options.num, how)

    few = {"solver": "euler", "steps": options.few_steps, "guidance": 1.0}
    reference = read("reference", parts[0])["features"]
    found = {
        "real": read("real", parts[1]),
        "reconstructed": read("reconstructed", parts[1], reconstruct),
        "trained": draw("trained", flow, guidance=1.0),
        "few steps": draw("few steps", flow, **few),
        "untrained": draw("untrained", untrained(flow, options.seed), guidance=1.0),
    }
    if flow.config.conditioning.can_guide:
        found["guidance 2"] = draw("guidance 2", flow, guidance=2.0)
    statistics = FeatureStatistics.of(reference, runtime.device)
    names = {"real": source.class_names, "reconstructed": source.class_names}
    drawn = flow.config.conditioning.class_names
    return {
        name: scores(columns, statistics, reference, extractor, names.get(name, drawn))
        for name, columns in found.items()
    }


def scores(
    columns: Columns, statistics: FeatureStatistics, reference: Tensor, extractor: Any, names: Sequence[str]
) -> dict[str, float]:
    """Distance with its standard error, precision and recall; and class accuracy with its ceiling, if it is judged."""
    features = columns["features"]
    how = {"features": extractor.name, "how": Scoring(device=extractor.device)}
    found = feature_scores(METRICS, features, statistics, reference, **how)
    distance = found.pop("fid" if "fid" in found else "fd")
    values = {"distance": distance.value, "standard_error": distance.standard_error}
    values |= {name: score.value for name, score in found.items()}
    if isinstance(extractor, JudgeFeatures) and extractor.classes and names:
        require_judged(extractor.record.class_names, names, "--judge")
        judge = extractor.classes.for_classes(extractor.record.class_names, names)
        score = class_accuracy(judge, features, columns["labels"])
        values |= {"class_accuracy": score.value, "class_accuracy_error": score.standard_error, "ceiling": score.limit}
    return values


def untrained(flow: FlowModel, seed: int) -> FlowModel:
    """The model with random weights; also in layers that start at zero, so that its velocity is not zero."""
    torch.manual_seed(seed)
    network = flow.config.build_network()
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.xavier_uniform_(parameter.flatten(1))
    network = network.eval().requires_grad_(False)
    return FlowModel(flow.config, network, flow.autoencoder).to(flow.runtime)


def ranking(sets: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Each step of the known order: the difference in standard errors, and whether it is as it must be."""
    steps = []
    for before, after in pairwise(ORDER):
        one, other = sets[before], sets[after]
        error = math.hypot(one["standard_error"], other["standard_error"])
        gap = (other["distance"] - one["distance"]) / max(error, 1e-12)
        steps.append({"step": f"{before} < {after}", "sigmas": gap, "holds": gap > SIGMAS})
    if "guidance 2" in sets and "class_accuracy" in sets["trained"]:
        one, other = sets["trained"], sets["guidance 2"]
        error = math.hypot(one["class_accuracy_error"], other["class_accuracy_error"])
        gap = (other["class_accuracy"] - one["class_accuracy"]) / max(error, 1e-12)
        steps.append({"step": "class accuracy: guidance 1 < guidance 2", "sigmas": gap, "holds": gap > SIGMAS})
    return steps


def print_table(results: dict[str, Any]) -> None:
    """One line per set, and one per step of the order."""
    print(f"{'':<16} {'distance':>10} {'+-':>8} {'precision':>10} {'recall':>8} {'classes':>8} {'ceiling':>8}")
    for name, one in results["sets"].items():
        classes = [f"{one[key]:8.3f}" if key in one else f"{'':>8}" for key in ("class_accuracy", "ceiling")]
        print(
            f"{name:<16} {one['distance']:>10.4g} {one['standard_error']:>8.2g} {one['precision']:>10.3f} "
            f"{one['recall']:>8.3f} {' '.join(classes)}"
        )
    for step in results["ranking"]:
        print(f"{step['step']:<42} {step['sigmas']:>8.1f} standard errors  {'yes' if step['holds'] else 'NO'}")


if __name__ == "__main__":
    main()
