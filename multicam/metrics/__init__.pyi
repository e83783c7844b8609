from .faithfulness import (
    Curve as Curve,
    Masked as Masked,
    deletion as deletion,
    insertion as insertion,
    road as road,
    seen_through as seen_through,
)
from .localization import (
    agreement as agreement,
    complexity as complexity,
    energy_inside as energy_inside,
    names_input as names_input,
    pointing_game as pointing_game,
    sparseness as sparseness,
)
from .robustness import (
    Infidelity as Infidelity,
    infidelity as infidelity,
    rectangles as rectangles,
    sensitivity as sensitivity,
)
from .randomization import (
    Randomization as Randomization,
    branch_of as branch_of,
    parameter_randomization as parameter_randomization,
)
from .measures import METRICS as METRICS, Explained as Explained, Metric as Metric
from .evaluation import Batch as Batch, evaluate as evaluate
from .ranking import Comparison as Comparison, Evaluation as Evaluation, Row as Row
from .explanations import explainer as explainer
