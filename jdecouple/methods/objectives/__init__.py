"""Objectives: what each block minimises, as pure losses and as the heads that carry them.

The route, not the objective, decides what is stopped between blocks; a head handles only the stops
inside itself.
"""

from jdecouple.methods.objectives.associated_learning import AssociatedLearning, associated_learning
from jdecouple.methods.objectives.augmented_net import AugmentedNet
from jdecouple.methods.objectives.auxiliary_net import AuxiliaryNet
from jdecouple.methods.objectives.base import (
    BlockInfo,
    Descending,
    Fronted,
    Head,
    HeadOutput,
    Objective,
    Scaling,
)
from jdecouple.methods.objectives.cross_entropy import CrossEntropy, cross_entropy
from jdecouple.methods.objectives.exits import Exits
from jdecouple.methods.objectives.feature_reconstruction import FeatureReconstruction
from jdecouple.methods.objectives.information_propagation import InformationPropagation, unit_range
from jdecouple.methods.objectives.information_regularization import (
    InformationRegularization,
    information_regularization,
)
from jdecouple.methods.objectives.momentum_net import MomentumNet
from jdecouple.methods.objectives.prediction_similarity import PredictionSimilarity
from jdecouple.methods.objectives.similarity_matching import similarity_matching, similarity_matrix
from jdecouple.methods.objectives.supervised_contrastive import (
    SupervisedContrastive,
    supervised_contrastive,
)

__all__ = [
    "AssociatedLearning",
    "AugmentedNet",
    "AuxiliaryNet",
    "BlockInfo",
    "CrossEntropy",
    "Descending",
    "Exits",
    "FeatureReconstruction",
    "Fronted",
    "Head",
    "HeadOutput",
    "InformationPropagation",
    "InformationRegularization",
    "MomentumNet",
    "Objective",
    "PredictionSimilarity",
    "Scaling",
    "SupervisedContrastive",
    "associated_learning",
    "cross_entropy",
    "information_regularization",
    "similarity_matching",
    "similarity_matrix",
    "supervised_contrastive",
    "unit_range",
]
