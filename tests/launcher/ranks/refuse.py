"""A rank that refuses what its user has asked for, as all others do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from gaudi_lm.errors import UserError, user_errors

with user_errors():
    raise UserError("--train_file texts.txt: not found")
