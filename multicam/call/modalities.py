"""A photo's frequency and texture companions: the other inputs that manipulation, texture and camera models take.

Every function takes photos `(b c h w)` with values in 0..1, grey or RGB, float32 or float64, and gives a tensor of the
same dtype on the same device. Compute companions before a model's mean and standard deviation are taken off the photo.
A flipped or resized photo needs its companions computed again: most of them do not commute with either.

`MODALITIES` lists them by name, with what a picture or an engine has to know about each.
"""

from multicam.call.companion import MODALITIES, Modality, grey, modality
from multicam.call.spectra import dct, dct_bands, fft_high_pass, fft_log_magnitude, phase_only
from multicam.call.textures import difference_of_gaussians, gabor, haar, local_binary_pattern, srm_residuals

__all__ = [
    "MODALITIES",
    "Modality",
    "dct",
    "dct_bands",
    "difference_of_gaussians",
    "fft_high_pass",
    "fft_log_magnitude",
    "gabor",
    "grey",
    "haar",
    "local_binary_pattern",
    "modality",
    "phase_only",
    "srm_residuals",
]
