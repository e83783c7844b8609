from .features import Kernels as Kernels, feature_maps as feature_maps, kernels as kernels
from .dream import Dream as Dream, activation_maximization as activation_maximization, deep_dream as deep_dream
from .concepts import Concepts as Concepts, factorize as factorize
