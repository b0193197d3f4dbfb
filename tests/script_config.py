"""The config that a script builds from its command line."""

from types import ModuleType
from typing import Any

from utils.config import load_config_as
from utils.schema import Config


def type_of_config(script: ModuleType) -> type[Config]:
    """The class that the script declares, or else `Config`."""
    classes = [one for one in vars(script).values() if isinstance(one, type) and one.__module__ == script.__name__]
    return next((one for one in classes if issubclass(one, Config)), Config)


def script_config(script: ModuleType, arguments: list[str]) -> Any:
    return load_config_as(type_of_config(script), arguments)
