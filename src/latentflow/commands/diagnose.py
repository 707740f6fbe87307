"""`latentflow diagnose`: what is right and wrong with a model, measured on images, as a page with pictures."""

from __future__ import annotations

import time

from latentflow.analysis.diagnosis import Diagnosis
from latentflow.analysis.verdicts import verdicts
from latentflow.artifacts import make_folder, require_apart, require_writable, write_json, write_text
from latentflow.evaluation.encoded_images import open_images_for
from latentflow.evaluation.model_diagnosis import held_out_and_trained, measure_diagnosis
from latentflow.evaluation.request import DiagnoseRequest
from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.model.own_images import part_of_own
from latentflow.pages.diagnosis import diagnosis_page
from latentflow.runtime import Runtime
from latentflow.sampling.contact_sheet import save_grid


@writes(lambda given: given["request"].out)
def diagnose(request: DiagnoseRequest, runtime: Runtime | None = None) -> Diagnosis:
    """Measure a model on images, and write page.html, diagnose.json and pictures/ into `out`.

    Raises:
        ArtifactError, ConfigError, DataError: the model or the images cannot be used, or do not fit each other.
        NonFiniteError: the model's numbers are not finite.
    """
    began = time.perf_counter()
    folder = require_writable(request.out)
    flow = FlowModel.from_pretrained(request.model, precision="fp32", runtime=runtime)
    require_apart(request.out, request.data, request.train)
    training, size = flow.config.training, flow.config.image_size
    source, train_source = open_images_for(flow, request.data), None
    if request.train is not None:
        train_source = part_of_own(training, open_images_for(flow, request.train), "all", size)
    elif parts := held_out_and_trained(flow, source):
        source, train_source = parts
        request = request.fitting(len(source))
    source = part_of_own(training, source, "all", size)
    diagnosis, sheets = measure_diagnosis(flow, source, train_source, request)
    diagnosis = diagnosis.model_copy(update={"seconds": round(time.perf_counter() - began, 1)})
    for name, pixels in sheets.items():
        save_grid(make_folder(folder / "pictures") / f"{name}.png", pixels.flatten(0, 1), pixels.shape[1])
    found = [one.model_dump() for one in verdicts(diagnosis)]
    write_json(folder / "diagnose.json", {**diagnosis.model_dump(mode="json"), "verdicts": found})
    write_text(folder / "page.html", diagnosis_page(diagnosis, folder))
    return diagnosis
