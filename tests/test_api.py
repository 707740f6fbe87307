"""The Python interface: type checkers see exactly the fields of the requests."""

from typing import get_type_hints

import pytest

from latentflow import api
from latentflow.sampling import request as requests

NAMES = ["Sampling", "Sample", "Inpaint", "MaskToImage", "ImageToImage", "Interpolate", "Vary", "Invert"]


@pytest.mark.parametrize("name", NAMES)
def test_options_are_the_fields_of_the_request(name):
    options, request = getattr(api, f"{name}Options"), getattr(requests, f"{name}Request")
    assert get_type_hints(options).keys() == request.model_fields.keys()
