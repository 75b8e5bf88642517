"""Accuracy against the share of training labels that is drawn anew, for several methods.

    python bench/label_noise.py --set data.data_dir=DIR --jobs 2 --output runs/label-noise

It is bench/accuracy.py with --sweep data.label_noise and other defaults: VGG-8 at an eighth of its
width with small heads on Fashion-MNIST for 3 epochs, three seeds. All flags of accuracy.py work;
--set and --set-for win over these settings. Validation and test labels are always clean; the seed
draws the noise, the weights and the order of the examples.
"""

import sys

import accuracy

RATES = ("0", "0.2", "0.4", "0.6", "0.8")
METHODS = ("bp", "scpl", "deinforeg")
SETTINGS = ("epochs=3",)
SETTINGS_FOR = {
    "vgg8": ("model.width=0.125",),
    "scpl": ("method.hidden=256", "method.features=256"),
    "deinforeg": ("method.projector=256-256",),
}


def main() -> int:
    flags = accuracy.parser(__doc__)
    flags.add_argument("--rates", nargs="+", default=RATES, metavar="SHARE")
    flags.set_defaults(methods=METHODS, data=["fashion_mnist"], models=["vgg8"])
    flags.set_defaults(seeds=["0", "1", "2"])
    options = flags.parse_args()
    options.sweep = [["data.label_noise", *options.rates], *options.sweep]
    options.set = [*SETTINGS, *options.set]
    present = {*options.methods, *options.models}
    own = [[name, *each] for name, each in SETTINGS_FOR.items() if name in present]
    options.set_for = [*own, *options.set_for]
    return accuracy.main(options, flags)


if __name__ == "__main__":
    sys.exit(main())
