"""What the files in configs/ begin with: a data set, a model and a method by name."""

from ml_collections import ConfigDict

from jdecouple import config as configuration
from jdecouple import methods, models


def parts(arguments: str) -> list[str]:
    """Data set, model and method of "dataset,model,method"; a path may have commas.

    Raises:
        ValueError: There are less than three parts.
    """
    found = [part.strip() for part in arguments.rsplit(",", 2)]
    if len(found) != 3:
        raise ValueError(f"'dataset,model,method' is needed after the file: given {arguments!r}")
    return found


def named(dataset: str, model: str, method: str) -> ConfigDict:
    """The default configuration with these names, and PyTorch's initial weights.

    The papers' code has those; local losses and LARS see their scale.

    Raises:
        ValueError: No model or no method has that name.
    """
    models.get(model)
    methods.arguments(method)
    config = configuration.default()
    config.data.name = dataset
    config.model.name, config.method.name = model, method
    config.model.init = config.method.init = "torch"
    return config
