"""What a model of paired images adds to its inputs: PSNR, SSIM and distances of three sets against the real images.

inputs           enlarged by bicubic interpolation; gray ones repeated
reconstructed    the real images, encoded and decoded: what the autoencoder allows
translated       drawn from the inputs, one seed each

python benchmarks/translation.py --model runs/sharp --data held_out --features judges/photos --num 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import measuring
import torch
from torch import Tensor

from latentflow.commands.evaluate import evaluate
from latentflow.data.painting.input_pixels import at_image_size, stack_inputs, unit_inputs
from latentflow.data.sources.images import open_images
from latentflow.evaluation.real_images import image_features
from latentflow.evaluation.request import EvaluationRequest
from latentflow.evaluation.shards import Columns, Work
from latentflow.metrics.feature_scores import Scoring, feature_scores
from latentflow.metrics.features.extractors import open_features
from latentflow.metrics.pairs import PairJudge
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime, open_runtime

SETS = ("inputs", "reconstructed", "translated")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model with the condition input")
    parser.add_argument(
        "--data", required=True, help="held-out images, from which its inputs are made, or with inputs/"
    )
    parser.add_argument("--features", default="random", help="the folder of a judge, or other features")
    parser.add_argument("--num", type=int, default=1000, help="images")
    parser.add_argument("--steps", type=int, default=8, help="of ab2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's choice")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    measuring.setup(options.device, options.threads)
    runtime = open_runtime(options.device)
    sets = {**unlearned(options, runtime), "translated": translated(options, runtime)}
    print(f"{'':<14} {'PSNR':>8} {'SSIM':>8} {'distance':>10} {'+-':>8}")
    for name in SETS:
        one = sets[name]
        print(f"{name:<14} {one['psnr']:>8.2f} {one['ssim']:>8.3f} {one['distance']:>10.4g} {one['error']:>8.2g}")
    results = {**vars(options), "results": None, "sets": sets}
    measuring.write_results("translation", runtime.device, results, options.results)
    return results


def translated(options: argparse.Namespace, runtime: Runtime) -> dict[str, float]:
    """The scores of the model, as `evaluate --task translate` has them."""
    request = EvaluationRequest(
        model=options.model,
        data=options.data,
        task="translate",
        features=options.features,
        metrics=["fid", "psnr", "ssim"],
        num=options.num,
        batch_size=options.batch_size,
        solver="ab2",
        steps=options.steps,
    )
    found = evaluate(request, runtime=runtime).report.scores
    distance = found["fid" if "fid" in found else "fd"]
    own = {name: found[name].value for name in ("psnr", "ssim")}
    return {**own, "distance": distance.value, "error": distance.standard_error}


def unlearned(options: argparse.Namespace, runtime: Runtime) -> dict[str, dict[str, float]]:
    """The scores of the inputs and of the autoencoder, by set."""
    flow = FlowModel.from_pretrained(options.model, runtime=runtime)
    config, size = flow.config, flow.config.image_size
    source = open_images(options.data, size, pixels=config.pixel_format, inputs=config.paired)
    extractor = open_features(options.features, autoencoder=flow.autoencoder, image_size=size, device=runtime.device)
    judge, rows = PairJudge(with_ssim=True), range(min(options.num, len(source)))

    def enlarge(pixels: Tensor, own: list[int]) -> tuple[Tensor, Columns]:
        inputs = unit_inputs(stack_inputs([source[row].input for row in own], config.input_format), config.input_format)
        enlarged = at_image_size(inputs, config.inputs.shrinking, config.pixel_format.channels)
        made = config.pixel_format.from_unit(enlarged)
        return made, judge(made, pixels)

    def reconstruct(pixels: Tensor, own: list[int]) -> tuple[Tensor, Columns]:
        made = torch.cat([flow.autoencoder.reconstruct(part) for part in flow.autoencoder.slices(pixels)])
        return made, judge(made, pixels)

    def read(name: str, change: Any = None) -> Columns:
        with image_progress(name, len(rows)) as count:
            work = Work(batch_size=options.batch_size, on_images=count)
            return image_features(source, rows, extractor, plan={}, work=work, change=change)

    real = read("real")["features"]
    statistics, sets = FeatureStatistics.of(real, runtime.device), {}
    for name, change in (("inputs", enlarge), ("reconstructed", reconstruct)):
        columns = read(name, change)
        how = {"features": extractor.name, "how": Scoring(device=extractor.device)}
        (distance,) = feature_scores(["fid"], columns["features"], statistics, real, **how).values()
        own = {score: float(columns[score].double().mean()) for score in ("psnr", "ssim")}
        sets[name] = {**own, "distance": distance.value, "error": distance.standard_error}
    return sets


if __name__ == "__main__":
    main()
