"""The Python interface: type checkers see exactly the fields of the requests."""

from inspect import signature
from typing import get_type_hints

import pytest

from latentflow import api
from latentflow.sampling import request as requests

NAMES = ["Sampling", "Edit", "Inpaint", "MaskToImage", "ImageToImage", "Interpolate", "Vary", "Invert"]


@pytest.mark.parametrize("name", NAMES)
def test_options_are_the_fields_of_the_request(name):
    options, request = getattr(api, f"{name}Options"), getattr(requests, f"{name}Request")
    assert get_type_hints(options).keys() == request.model_fields.keys()


def test_the_number_of_images_comes_first():
    assert {"num", *get_type_hints(api.SampleOptions)} == requests.SampleRequest.model_fields.keys()
    assert list(signature(api.LatentFlow.sample).parameters)[1] == "num"
