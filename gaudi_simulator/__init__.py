"""A simulated Gaudi card: an importable `habana_frameworks` for hosts that have none.

`STAND_IN` is the folder to put LAST on `sys.path` and `PYTHONPATH`, so that a real `habana_frameworks` always wins:

- `habana_frameworks`: without `GAUDI_SIMULATOR` in the environment just enough for `optimum.habana` to be imported
  and its patched models to run on plain CPU tensors; with `GAUDI_SIMULATOR=<number of cards>` a real PyTorch
  `hpu` device whose memory is host memory;
- `torchvision`: empty, because `adapt_transformers_to_gaudi` imports it for vision models;
- `habana_torch_plugin-*.dist-info`: what `optimum.habana`, on import, expects `pip list` to know.

`python -m gaudi_simulator --report` says what is simulated, how faithfully, and what is not. Nothing here imports
torch.
"""

from pathlib import Path

STAND_IN = str(Path(__file__).resolve().parent / "path")
