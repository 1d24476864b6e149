"""The simulated card, by the tests in `on_card`, which run in a process that has cards."""

import pytest
from cards import test_on_card as run_on_card


@pytest.mark.slow
def test_device():
    run_on_card("card_device.py", GAUDI_SIMULATOR_MEMORY_GB="0.0625")


@pytest.mark.slow
def test_random_and_autocast():
    run_on_card("card_numerics.py")


@pytest.mark.slow
def test_graphs():
    run_on_card("card_graphs.py")


@pytest.mark.slow
def test_graphs_in_eager_mode():
    run_on_card("card_eager.py", PT_HPU_LAZY_MODE="0")


@pytest.mark.slow
def test_compiled_models():
    run_on_card("card_compiled.py", PT_HPU_LAZY_MODE="0")


@pytest.mark.slow
def test_recorded_operations():
    run_on_card("card_operations.py")


@pytest.mark.slow
def test_gaudi_models():
    run_on_card("card_models.py")


@pytest.mark.slow
def test_attention_of_each_model():
    run_on_card("card_attention.py")


@pytest.mark.slow
def test_fp8():
    run_on_card("card_fp8.py", PT_HPU_LAZY_MODE="0")


@pytest.mark.slow
def test_calls_by_name():
    run_on_card("card_calls.py")
