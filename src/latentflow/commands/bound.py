"""`latentflow bound`: the paper's bound on how far a model's images can be from the data, term by term."""

from __future__ import annotations

import time
from dataclasses import replace

from latentflow.artifacts import make_folder, require_apart, require_writable, write_json, write_text
from latentflow.evaluation.encoded_images import encode_reference, open_images_for
from latentflow.evaluation.measured_bound import MeasuredBound, measure_bound
from latentflow.evaluation.request import BoundRequest
from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.model.own_images import part_of_own
from latentflow.pages.bound import bound_charts, bound_page, bound_record
from latentflow.pages.charts import chart_file
from latentflow.runtime import Runtime


@writes(lambda given: given["request"].out)
def bound(request: BoundRequest, runtime: Runtime | None = None) -> MeasuredBound:
    """Measure every term of the bound, and write page.html, bound.json and the charts into `out`, if it is given.

    Raises:
        ArtifactError, ConfigError, DataError: the model or the images cannot be used, or do not fit each other.
        NonFiniteError: the model's numbers are not finite.
    """
    began = time.perf_counter()
    out = request.out
    folder = None if out is None else require_writable(out)
    flow = FlowModel.from_pretrained(request.model, precision="fp32", runtime=runtime)
    if out is not None:
        require_apart(out, request.data)
    num = max(request.num, request.num_data)
    how = {"least": request.num, "batch_size": request.batch_size, "seed": request.seed, "num_decoded": request.num}
    training, size = flow.config.training, flow.config.image_size
    source = part_of_own(training, open_images_for(flow, request.data), "all", size)
    reference, reconstruction = encode_reference(flow, source, num, **how)
    conditioning = flow.config.conditioning
    reference = reference.with_columns(conditioning, among=conditioning.required)
    measured = measure_bound(flow, reference, reconstruction, request)
    measured = replace(measured, seconds=time.perf_counter() - began)
    if folder is not None:
        make_folder(folder)
        write_json(folder / "bound.json", bound_record(measured))
        for name, chart in bound_charts(measured).items():
            write_text(folder / f"{name}.svg", chart_file(chart))
        write_text(folder / "page.html", bound_page(measured))
    return measured
