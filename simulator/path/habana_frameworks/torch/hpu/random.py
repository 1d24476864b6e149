"""Random state of the cards."""


def manual_seed(seed: int) -> None:
    pass


def manual_seed_all(seed: int) -> None:
    pass
