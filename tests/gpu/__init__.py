"""Tests of what needs a GPU to be seen. Without one they are skipped, each with the reason.

LATENTFLOW_TEST_DEVICE=cpu runs on the CPU those that mean something there; so their logic is tested anywhere.
"""
