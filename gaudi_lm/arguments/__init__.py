"""Flags; here transformers is imported for the first time."""

from gaudi_lm.optimum_imports import leave_out_scikit_learn

leave_out_scikit_learn()
