"""Random state of the cards. Each has a generator of its own, apart from the CPU's."""

import torch

from habana_frameworks.torch import _simulator


class _Generators:
    """The cards' generators by index, made when first asked for."""

    def __len__(self) -> int:
        return _simulator.CARDS

    def __getitem__(self, card: int) -> torch.Generator:
        if not 0 <= card < _simulator.CARDS:
            raise IndexError(card)
        return torch.ops.gaudi_simulator.generator(card)


default_generators = _Generators()


def _generator(device="hpu") -> torch.Generator:
    from habana_frameworks.torch import hpu

    return default_generators[hpu._card(device)]


def manual_seed(seed: int) -> None:
    """Seed the current card; nothing without one."""
    if _simulator.CARDS:
        _generator().manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Seed all cards."""
    for generator in default_generators:
        generator.manual_seed(seed)


def seed() -> int:
    return _generator().seed()


def initial_seed() -> int:
    return _generator().initial_seed()


def get_rng_state(device="hpu") -> torch.Tensor:
    """State of a card's generator, uint8 in host memory."""
    return _generator(device).get_state()


def set_rng_state(new_state: torch.Tensor, device="hpu") -> None:
    _generator(device).set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [generator.get_state() for generator in default_generators]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for generator, state in zip(default_generators, new_states, strict=False):
        generator.set_state(state)
