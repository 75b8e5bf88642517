"""The table of the configuration's keys: default, meaning and who takes them."""

from typing import Any, NamedTuple

from ml_collections.config_dict import placeholder


class Key(NamedTuple):
    """A key of the configuration that is no option of a method, model, optimizer or corrector.

    Attributes:
        name: the key, such as "mesh.stages".
        default: its value where none is given; a type leaves it open, and is that of its values.
        meaning: what it is. That of an option of `jdecouple.data.load` stands there.
        takers: what takes it; "" for every run. Where a table of the code knows it, it stands
            there: `rules.SCHEDULE_KEYS`, and the options of data sets.
    """

    name: str
    default: Any
    meaning: str = ""
    takers: str = ""

    @property
    def kind(self) -> type:
        """Type of its values."""
        return self.default if isinstance(self.default, type) else type(self.default)

    @property
    def value(self) -> Any:
        """Its default; None where that is open."""
        return None if isinstance(self.default, type) else self.default


KEYS: tuple[Key, ...] = (
    Key("method.name", "deinforeg", "What each block minimises, and how error reaches it."),
    Key("model.name", "vgg8", "The network."),
    Key("data.name", "digits", "The data set: one of `jdecouple list data`, or of TFDS."),
    Key("data.data_dir", str),
    Key("data.download", False),
    Key("data.augment", "none", "Random views of the training images.", "data sets of images"),
    Key(
        "data.crop_padding",
        int,
        "Pixels of padding on each side of an image before it is cropped; None: an eighth of it.",
        "augmentations that crop",
    ),
    Key(
        "data.crop_mode",
        "zeros",
        "What the padding holds: zeros, or reflect, the image mirrored at its outermost pixels.",
        "augmentations that crop",
    ),
    Key(
        "data.cutout",
        0,
        "Side in pixels of a square of the mean colour at a random place of a view; 0: none.",
        "data sets of images",
    ),
    Key("data.mean", tuple),
    Key("data.std", tuple),
    Key("data.label_noise", 0.0),
    Key("data.validation", float),
    Key("data.image_size", int),
    Key("data.synthetic_size", 4096),
    Key("data.channels", 3),
    Key("data.num_classes", 10),
    Key("data.max_length", int),
    Key("data.parts", tuple),
    Key("data.vocabulary_size", int),
    Key("data.clean", "none"),
    Key("data.glove", str),
    Key("data.label_column", str),
    Key("data.text_columns", tuple),
    Key("data.tokenizer", "bytes"),
    Key(
        "data.buckets",
        tuple,
        "Lengths that batches of texts are padded to, the last data.max_length; None: that alone.",
        "data sets of texts",
    ),
    Key("optimizer.name", "adam", "How gradients become updates; or any, as module:function."),
    Key("optimizer.learning_rate", 1e-3, "The rate at which its schedule begins."),
    Key("optimizer.schedule", "cosine", "How the learning rate moves."),
    Key("optimizer.end_learning_rate", 0.0, "Where the cosine ends."),
    Key("optimizer.decay_epochs", (), "Epochs at which decay_factor multiplies the rate."),
    Key("optimizer.decay_factor", 0.1, "What multiplies the rate at every one of decay_epochs."),
    Key(
        "optimizer.per_epoch",
        False,
        "Whether the rate moves once an epoch, as in the papers' code, and not at every step.",
    ),
    Key("optimizer.warmup_epochs", 0.0, "Epochs over which the rate rises to its schedule."),
    Key("optimizer.warmup_start", 0.01, "Share of the rate that it rises from."),
    Key("corrector.name", "none", "What is done about gradients that are late.", "delayed methods"),
    Key(
        "growth.blocks",
        tuple,
        "Numbers of blocks that exist, in turn; None: all from the start.",
        "local methods",
    ),
    Key("growth.epochs", tuple, "Epochs from which on they do, the first 0.", "local methods"),
    Key("growth.steps", tuple, "The same in steps, instead of growth.epochs.", "local methods"),
    Key(
        "growth.freeze",
        True,
        "Whether the blocks that exist train no more when others are added.",
        "local methods",
    ),
    Key(
        "early_stopping.patience",
        int,
        "Evaluations without a better validation accuracy after which the run ends; None: never.",
        "data sets with a validation split",
    ),
    Key(
        "early_stopping.min_delta",
        0.0,
        "What the accuracy must rise by to be better.",
        "data sets with a validation split",
    ),
    Key(
        "engine",
        "mpmd",
        "Calls for every stage (mpmd), one program (spmd), or what fits (auto).",
    ),
    Key("schedule", "auto", "Order of the stages' work; auto: that of the method."),
    Key("microbatches", 1, "Parts of a batch that go through the stages one after another."),
    Key("mesh.stages", int, "Groups of devices for the stages; None: as many as there can be."),
    Key("mesh.data", 1, "Replicas of every stage, each with a part of the batch."),
    Key("mesh.replicas", tuple, "Replicas of each stage, instead of mesh.stages and mesh.data."),
    Key(
        "mesh.shard_optimizer",
        False,
        "Whether each replica of a stage holds a part of the optimizer's state, not the whole.",
    ),
    Key(
        "mesh.propose",
        False,
        "Whether simulation chooses boundaries and replicas; they are printed.",
    ),
    Key(
        "mesh.elastic",
        str,
        "Stages in processes that outlive one another: one above a lost stage waits (wait), or "
        "trains on its last messages once more (replay); None: all end.",
        "local methods",
    ),
    Key(
        "mesh.elastic_buffer",
        32,
        "Messages that an elastic stage keeps for the one above, and to replay.",
        "local methods",
    ),
    Key("num_stages", int, "Stages, K; None: mesh.stages."),
    Key("boundaries", tuple, "Blocks at which stages begin, the first 0; None: balanced by cost."),
    Key(
        "split",
        str,
        "A published cut into stages, such as fdg, instead of boundaries.",
        "models with such splits: residual nets",
    ),
    Key("max_in_flight", int, "Batches that may be dispatched and unfinished; None: 2 a stage."),
    Key("chunk", 1, "Batches that a stage trains on in one compiled call."),
    Key("batch_size", 128, "Examples of a step, on all devices together."),
    Key("epochs", 1, "Times that the training split is gone through."),
    Key("steps", int, "Length of the training in steps; it wins over epochs."),
    Key("eval_every", int, "Steps between evaluations; None: an epoch."),
    Key("checkpoint.every", int, "Steps between checkpoints; None: as eval_every."),
    Key(
        "checkpoint.apart",
        str,
        "Processes that see no common workdir save their stages each in its own, and process 0 is "
        "sent them at the end (gather) or not (keep); None: process 0 saves all.",
    ),
    Key("checkpoint.keep", 3, "How many of the last checkpoints stay, beside the best."),
    Key("log_every", 50, "Steps between lines of the log."),
    Key(
        "tracking",
        object,
        "Names of what else gets the metrics, with commas or as a tuple: tensorboard, wandb, "
        "or what was registered.",
    ),
    Key(
        "gradient_norms",
        False,
        "Whether the norms of the gradients are among the metrics, which costs some time.",
    ),
    Key("profile", int, "Steps to trace, after the first 10, and to draw; no stages are fused."),
    Key(
        "sufficient_direction",
        False,
        "Whether it is measured how far late gradients agree with backpropagation's.",
        "method fr",
    ),
    Key(
        "dtype",
        "float32",
        "What is computed in: float32, bfloat16 or float16 (with scaled losses); weights, "
        "statistics and losses are float32.",
    ),
    Key(
        "wire",
        str,
        "What goes from stage to stage in training: float32, bfloat16, int8; None: no rounding.",
    ),
    Key("clip_norm", float, "Bound on the norm of the gradient.", "synchronous methods"),
    Key("accumulate", 1, "Batches to an optimizer step, which takes the mean of their gradients."),
    Key("ema", float, "Decay of averages of the weights, which are evaluated; None: no averages."),
    Key("remat", "auto", "What a forward keeps: none, elementwise, blocks, stages or offload."),
    Key("seed", 0, "Root of all random keys."),
    Key(
        "init_from",
        str,
        "A workdir, or WORKDIR@STEP, with whose weights a new run begins (fine-tuning).",
        "runs whose model does not grow",
    ),
)


def nested() -> dict[str, Any]:
    """The defaults by section; what is open is a placeholder of its own, as shared ones link."""
    config: dict[str, Any] = {}
    for key in KEYS:
        *path, last = key.name.split(".")
        section = config
        for name in path:
            section = section.setdefault(name, {})
        section[last] = placeholder(key.kind) if key.value is None else key.default
    return config
