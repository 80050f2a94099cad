"""Says why the contract tests do not run where they do not."""

import os

import pytest


def test_nemo_rl_source_is_given():
    if not os.environ.get("NEMO_RL_SRC"):
        pytest.skip("NEMO_RL_SRC is not set: make test-nemo-rl NEMO_RL_SRC=<a checkout of NeMo-RL> runs these tests")
    assert os.path.isfile(os.path.join(os.environ["NEMO_RL_SRC"], "nemo_rl", "__init__.py"))
