from .layers import Layer as Layer
from .reshape import as_it_is as as_it_is, channels_last as channels_last, stacked as stacked
from .layer_table import LayerInfo as LayerInfo, LayerTable as LayerTable, list_layers as list_layers
from .trace import Site as Site, Trace as Trace
from .packed import PackedModel as PackedModel
from .replay import Replay as Replay
from .mixing import Mixing as Mixing
from .rectifiers import Rectifiers as Rectifiers
