"""Flags; here transformers is imported for the first time."""

from gaudi_lm.optimum_imports import import_transformers

import_transformers()
