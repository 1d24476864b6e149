"""Device identity."""

from enum import IntEnum

from habana_frameworks.torch import hpu  # noqa: F401  (callers ask for experimental.hpu)


class synDeviceType(IntEnum):
    """Generations, by the real names."""

    synDeviceGaudi = 1
    synDeviceGaudi2 = 2
    synDeviceGaudi3 = 3


def _get_device_type() -> synDeviceType:
    return synDeviceType.synDeviceGaudi2


def _is_fp16_supported() -> bool:
    return True
