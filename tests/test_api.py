"""The Python interface: people, editors and type checkers see exactly the fields of the requests."""

from inspect import Parameter, getdoc, signature
from typing import get_type_hints

import pytest

from latentflow import api
from latentflow.api import LatentFlow
from latentflow.sampling import request as requests

NAMES = ["Sampling", "Edit", "Inpaint", "MaskToImage", "Translate", "ImageToImage", "Interpolate", "Vary", "Invert"]
METHODS = {
    "sample": "Sample",
    "inpaint": "Inpaint",
    "mask_to_image": "MaskToImage",
    "translate": "Translate",
    "image_to_image": "ImageToImage",
    "interpolate": "Interpolate",
    "vary": "Vary",
    "invert": "Invert",
}


@pytest.mark.parametrize("name", NAMES)
def test_options_are_the_fields_of_the_request(name):
    options, request = getattr(api, f"{name}Options"), getattr(requests, f"{name}Request")
    assert get_type_hints(options).keys() == request.model_fields.keys()


def test_the_number_of_images_comes_first():
    assert {"num", *get_type_hints(api.SampleOptions)} == requests.SampleRequest.model_fields.keys()
    assert list(signature(LatentFlow.sample).parameters)[1] == "num"


def test_every_method_that_takes_a_request_is_looked_at():
    taking = {name for name, one in vars(LatentFlow).items() if callable(one) and not name.startswith("_")}
    assert taking >= METHODS.keys()
    assert {name for name in taking if hasattr(getattr(LatentFlow, name), "__signature__")} == METHODS.keys()


@pytest.mark.parametrize(("method", "name"), METHODS.items())
def test_the_signature_shows_every_field_with_its_type_and_default(method, name):
    options, request = getattr(api, f"{name}Options"), getattr(requests, f"{name}Request")
    shown, hints = signature(getattr(LatentFlow, method)).parameters, get_type_hints(options)
    assert shown.keys() >= request.model_fields.keys()
    assert not [one for one in shown.values() if one.kind is Parameter.VAR_KEYWORD]
    assert hints
    for field, hint in hints.items():
        assert shown[field].kind is Parameter.KEYWORD_ONLY
        assert shown[field].annotation == hint
        assert shown[field].default == request.model_fields[field].default


@pytest.mark.parametrize(("method", "name"), METHODS.items())
def test_help_describes_every_field(method, name):
    text = getdoc(getattr(LatentFlow, method))
    for field in get_type_hints(getattr(api, f"{name}Options")):
        described = getattr(requests, f"{name}Request").model_fields[field].description
        assert f"\n    {field}: {described}" in text
