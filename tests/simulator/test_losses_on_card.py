"""The loss without full logits, and packed rows, on a simulated card."""

import pytest
from cards import test_on_card as run_on_card


@pytest.mark.slow
def test_losses_and_packed_rows():
    run_on_card("card_losses.py")
