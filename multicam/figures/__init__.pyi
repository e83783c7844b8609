from .colours import colorize as colorize, normalize as normalize, overlay as overlay
from .page import Picture as Picture
from .tiles import Tile as Tile, figure as figure
from .panels import compare as compare, panel as panel
from .attention import flow_figure as flow_figure, head_sheet as head_sheet, query_figure as query_figure
from .saliency import saliency_figure as saliency_figure
from .features import feature_sheet as feature_sheet, kernel_sheet as kernel_sheet
from .dreams import dream_figure as dream_figure, history_figure as history_figure
from .shares import contribution_figure as contribution_figure
from .concepts import concept_figure as concept_figure
