"""pytest plugin: NeMo-RL's own tests run with the integration enabled (``pytest -p nemo_enabled``).

They import VllmGeneration from the module that defines it, which the integration leaves as it is: here it is replaced
there, too, so that the routed class is what is tested.
"""

from __future__ import annotations


def pytest_configure(config):
    import nemo_absent

    nemo_absent.install()
    from kvrouter.integrations import nemo_rl

    nemo_rl.enable()
    from nemo_rl.models.generation.vllm import vllm_generation

    from kvrouter.integrations.nemo_rl.generation import RoutedVllmGeneration

    vllm_generation.VllmGeneration = RoutedVllmGeneration


def pytest_report_header(config):
    from kvrouter.integrations import nemo_rl

    return f"kvrouter.integrations.nemo_rl enabled: {nemo_rl.is_enabled()}"
