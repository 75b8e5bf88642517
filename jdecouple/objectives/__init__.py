"""Objectives: what each block minimises, as pure losses and as the heads that carry them.

The route, not the objective, decides what is stopped between blocks; a head handles only the stops
inside itself.
"""

from jdecouple.objectives.associated_learning import AssociatedLearning, associated_learning
from jdecouple.objectives.auxiliary_net import AuxiliaryNet
from jdecouple.objectives.base import Descending, Head, HeadOutput, Objective, Site
from jdecouple.objectives.cross_entropy import CrossEntropy, cross_entropy
from jdecouple.objectives.exits import Exits
from jdecouple.objectives.information_propagation import InformationPropagation, unit_range
from jdecouple.objectives.information_regularization import (
    InformationRegularization,
    information_regularization,
)
from jdecouple.objectives.prediction_similarity import PredictionSimilarity
from jdecouple.objectives.similarity_matching import similarity_matching, similarity_matrix
from jdecouple.objectives.supervised_contrastive import (
    SupervisedContrastive,
    supervised_contrastive,
)

__all__ = [
    "AssociatedLearning",
    "AuxiliaryNet",
    "CrossEntropy",
    "Descending",
    "Exits",
    "Head",
    "HeadOutput",
    "InformationPropagation",
    "InformationRegularization",
    "Objective",
    "PredictionSimilarity",
    "Site",
    "SupervisedContrastive",
    "associated_learning",
    "cross_entropy",
    "information_regularization",
    "similarity_matching",
    "similarity_matrix",
    "supervised_contrastive",
    "unit_range",
]
