from .shapley import Contribution as Contribution, Summary as Summary, contribution as contribution
from .regions import (
    RegionContribution as RegionContribution,
    region_contribution as region_contribution,
    superpixels as superpixels,
)
from .interactions import double_occlusion as double_occlusion, second_order_gradient as second_order_gradient
from .game import Game as Game, Scored as Scored
