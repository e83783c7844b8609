"""What a caller without a type checker gets wrong: a MulticamError with the way out, from every public entry.

In the tests every annotation is checked at run time, so these calls run in a Python of their own.
"""

import subprocess
import sys

import pytest

SETUP = """
import torch, warnings
from torch import nn
import multicam as mc
from multicam.saliency.averaging import expected_gradients, integrated_gradients, smoothgrad, vargrad
from multicam.saliency.captum_bridge import captum_attribution
from multicam.saliency.occluding import occlusion
from multicam.saliency.gradients import gradient, guided_backprop, guided_gradcam
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
x = torch.rand(2, 3, 8, 8)
cam = mc.GradCAM(model, "0")
class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.attn = nn.Conv2d(3, 8, 2, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    def forward(self, image):
        tokens = self.conv(image).flatten(2).mT
        return self.attn(tokens, tokens, tokens)[0].mean(1)
attends = Attends()
att = mc.attention(attends, x, 1)
"""
CALLS = {
    'cam(x, "cat")': "a target class is an int, or one int per sample, not 'cat'",
    "cam(x, 1.5)": "a target class is an int",
    "cam(x, True)": "a target class is an int",
    "cam(x, [1.5, 2])": "a target class is an int",
    "cam(x, 5)": "target class 5 does not exist: the output has classes 0 to 4",
    "cam(x, [1, 2, 3])": "3 target classes for 2 samples",
    "cam(x, lambda out: out)": "must return one floating-point score per sample",
    "cam((x, x))": "cannot be called with",
    "cam({'image': x})": "no argument 'image'. There are: 'input'",
    "cam('photo.jpg')": "no tensor with a batch axis",
    "cam(None)": "no tensor with a batch axis",
    "mc.GradCAM(len, '0')": "a model is a torch.nn.Module, not a builtin_function_or_method",
    "mc.GradCAM(model, '9')": "no layer in Sequential '9'",
    "mc.GradCAM(model, 0)": "a layer is a module path, a module or a Layer, not 0",
    "mc.GradCAM(model, ['0'])": "a layer is a module path, a module or a Layer, not ['0']",
    "mc.GradCAM(model, {})": "no layer to explain",
    "mc.GradCAM(model, nn.ReLU())": "the layer ReLU is not a module of this Sequential",
    "mc.GradCAM(model, '0#last')": "must be a number counted from 0, as in 0#1",
    "mc.GradCAM(model, mc.Layer('0', call=-1))": "calls are counted from 0, not -1",
    "mc.GradCAM(model, '')": "has no spatial axes",
    "mc.PackedModel(model, x)(x.numpy())": "takes packed.pack(inputs), one tensor, not a ndarray",
    "mc.PackedModel(model, 'photo.jpg')": "nothing to pack",
    "mc.PackedModel(model, x, layers=[0])": "a layer is a module path, a module or a Layer, not 0",
    "mc.list_layers(len, x)": "a model is a torch.nn.Module",
    "mc.contribution(model, x, 1, players=0)": "players are names of inputs, or groups of such, in a list or a dict, not 0",
    "mc.contribution(model, x, 1, players=[0])": "inputs are named by a string, or several in a list, not by 0",
    "mc.contribution(model, x, 1, players={'a': ['input', None]})": "inputs are named by a string, or several in a list",
    "mc.contribution(model, x, 1, players=[None])": "there is no input to be a player",
    "mc.contribution(model, x, 1, baseline='black')": "no baseline 'black'",
    "mc.region_contribution(model, x, 1, regions='many')": "cannot be cut into a grid of 'many'",
    "mc.region_contribution(model, x, 1, regions=[0, 1])": "cannot be cut into a grid of [0, 1]",
    "mc.region_contribution(model, x, 1, regions=2.5)": "cannot be cut into a grid of 2.5",
    "mc.shares.superpixels(x[0])": "superpixels are of images (b c h w)",
    "mc.double_occlusion(model, x, x > 0, 1)": "a region is given by the name of its input",
    "mc.second_order_gradient(model, x, {'input': x > 0}, 1)": "is a boolean mask (8, 8) or (2, 8, 8), or 2 slices",
    "mc.evaluate(model, [mc.gradient], ['deletion'], [x])": "give methods by name",
    "mc.evaluate(model, {'a': mc.GradCAM}, ['deletion'], [x])": "explainer(GradCAM, layers) makes one of a class",
    "mc.evaluate(model, {'a': mc.gradient}, [len], [x])": "metrics are names, or each a Metric(name, measure), in a list",
    "mc.evaluate(model, {'a': mc.gradient}, None, [x])": "metrics are names, or each a Metric(name, measure), in a list",
    "mc.evaluate(model, {'a': mc.gradient}, ['deletion'], None)": "data is a list of batches, or another iterable of them, not a NoneType",
    "mc.metrics.infidelity(model, x, [1], 1)": "an explanation is a map, a dict of maps or Attributions, not a list",
    "mc.metrics.infidelity(model, x, mc.gradient(model, x, 1), 1, patch='a')": "patch is a number, not 'a'",
    "mc.metrics.sensitivity(model, x, mc.gradient, 1, radius='a')": "radius is a number, not 'a'",
    "mc.metrics.sensitivity(model, x, mc.GradCAM, 1)": "explainer(GradCAM, layers) makes one of a class",
    "mc.metrics.parameter_randomization(model, x, mc.gradient, 1, order='up')": "order is 'cascading' or 'independent', not 'up'",
    "mc.metrics.parameter_randomization(model, x, mc.gradient, 1, within=model[0])": "within=… takes the paths of modules",
    "mc.metrics.parameter_randomization(model, x, 'gradient', 1)": "a method is a function of model, inputs and target",
    "mc.metrics.branch_of(model, x, 0)": "inputs are named by strings, such as 'input', not by 0",
    "mc.explainer('GradCAM')": "explainer is for classes such as GradCAM",
    "mc.Augmented(mc.GradCAM)": "refines a CAM, such as GradCAM(model, layers)",
    "mc.Augmented(cam, inputs=0)": "inputs are named by a string, or several in a list, not by 0",
    "mc.ScoreCAM(model, '0', masked=0)": "inputs are named by a string",
    "mc.AblationCAM(model, '0', batch_size='many')": "batch_size must be a whole number of at least 1, not 'many'",
    "mc.SSCAM(model, '0', std='wide')": "std is a number, not 'wide'",
    "mc.FEM(model, '0', k='two')": "k is a number, not 'two'",
    "mc.KPCACAM(model, '0', gamma='auto')": "gamma is a number, not 'auto'",
    "mc.FinerCAM(cam, similar=1)": "similar classes are ranks from 1, the nearest, as in (1, 2, 3), not 1",
    "mc.FinerCAM(cam, similar=(1.5,))": "similar classes are ranks from 1",
    "mc.Augmented(cam, factors=1.0)": "factors are numbers other than 0, as in (0.9, 1.0, 1.1), not 1.0",
    "mc.SESS(cam, scales=1.5)": "scales enlarge: each is at least 1",
    "mc.targets.Similarity([1.0, 2.0])": "the embedding to compare with is a tensor (c) or (b c), not [1.0, 2.0]",
    "cam.trace(x).rescore({'input': x[:0]})": "with at least one row",
    "cam.trace(x).rescore({'input': x.numpy()})": "what-ifs are a tensor (n …)",
    "cam.trace(x).sites[''].rescore([1.0])": "what-ifs are a tensor (n …)",
    "cam.trace(x).rescore({'input': x}, 0.0)": "sample 0.0 does not exist: the call has samples 0 to 1",
    "mc.RISE(model, 0)": "inputs are named by a string",
    "mc.RISE(model, keep='half')": "keep is a share between 0 and 1, not 'half'",
    "mc.explain_methods(model, x, '0', [mc.RISE])": "methods are classes such as GradCAM, not",
    "mc.explain_methods(model, x, '0', [cam])": "methods are classes such as GradCAM, not",
    "mc.explain_methods(model, x, '0', [mc.FinerCAM])": "made of one: FinerCAM(GradCAM(model, layers))(inputs, target)",
    "mc.explain_methods(model, x, '0', 'GradCAM')": "methods are several classes in a list, as in [GradCAM, HiResCAM], not 'GradCAM'",
    "mc.explain_methods(model, x, '0', mc.GradCAM)": "methods are several classes in a list, as in",
    "mc.explainer(mc.FinerCAM, '0')": "made of one: FinerCAM(GradCAM(model, layers))(inputs, target)",
    "mc.explainer(mc.CAM, '0')": "which is abstract",
    "mc.explainer(mc.GradCAM)": "so GradCAM(model) cannot be made: missing a required argument: 'layers'",
    "guided_gradcam(model, x, '0', method=mc.SESS)": "made of one: SESS(GradCAM(model, layers))(inputs, target)",
    "mc.targets.SegmentationScore('sky')": "a target class is an int",
    "mc.attention(len, x)": "a model is a torch.nn.Module",
    "mc.attention(attends, x, keep='prob')": "no keep 'prob'; did you mean 'probs'",
    "mc.attention(attends, x, layouts=[1])": "layouts is a mapping such as",
    "mc.attention(attends, x, layouts={'image': (4, 4)})": "a layout is tokens(rows, columns, prefix=…), not in",
    "mc.attention(attends, x, streams=['attn'])": "streams is a mapping such as",
    "mc.attention(attends, x, streams={'attn': 'image'})": "a stream is two inputs, that of the queries and that of the keys",
    "att.find(3)": "attentions are found by a module path or a pattern with *, not by 3",
    "att.between(0, 1)": "no input '0'. There are: 'image'",
    "att[0].heatmap(3)": "no input '3'. There are: 'image'",
    "att[0].heatmap(query=(1, 'a'))": "a pixel (y, x), not (1, 'a')",
    "att[0].heatmap(heads=1.5)": 'heads is "mean", or of 0 to 1, not 1.5',
    "att[0].heatmap(value=3)": "no value '3'",
    "att.gradients(1.0)": "the score carries no gradient",
    "mc.rollout(None)": "give attentions of a recording, such as att",
    "mc.rollout(att, residual='half')": "residual is a number, not 'half'",
    "mc.relevance(att).matrix('a')": "has samples 0 to 1, not 'a'",
    "mc.figures.query_figure(att, x, (1, 1))": "inputs are a mapping from names to images",
    "mc.figures.query_figure(att, {'image': x}, (1, 1), onto=3)": "inputs are named by a string, or several in a list, not by 3",
    "mc.figures.head_sheet(None)": "a figure of attention needs at least one attention",
    "gradient(x, model)": "a model is a torch.nn.Module, not a Tensor",
    "gradient(model, x, wrt=3)": "inputs are named by a string, or several in a list, not by 3",
    "gradient(model, x, 'cat')": "a target class is an int, or one int per sample, not 'cat'",
    "gradient(model, 'photo.jpg')": "there is no floating-point image input to explain in Inputs(input='photo.jpg')",
    "gradient(model, x, output='logits')": "the model returns one tensor, so output='logits' names nothing",
    "gradient(model, x).maps('mean')": "no way to reduce channels 'mean'. There are: 'sum', 'max', 'norm'",
    "gradient(model, x).maps(['sum'])": "no way to reduce channels",
    "gradient(model, x).evidence": "these attributions are not in units of the score",
    "guided_backprop(model, x, wrt=['rgb', 3])": "inputs are named by a string, or several in a list",
    "guided_gradcam(model, x, 0)": "a layer is a module path, a module or a Layer, not 0",
    "guided_gradcam(model, x, '0', method=cam)": "methods are classes such as GradCAM, not",
    "guided_gradcam(model, x, '0', method='GradCAM')": "methods are classes such as GradCAM, not 'GradCAM'",
    "smoothgrad(model, x, std='wide')": "std is a number, not 'wide'",
    "smoothgrad(model, x, samples=2.5)": "samples must be a whole number of at least 1, not 2.5",
    "vargrad(model, x, batch_size='many')": "batch_size must be a whole number of at least 1, not 'many'",
    "vargrad(model, x, seed='a')": "seed must be a whole number, not 'a'",
    "integrated_gradients(model, x, steps='many')": "steps must be a whole number of at least 1, not 'many'",
    "integrated_gradients(model, x, baseline='noise')": "no baseline 'noise'. There are: 'mean', 'blur'",
    "integrated_gradients(model, x, baseline=[0, 1])": "the baseline of input 'input' is a number, 'mean', 'blur' or a tensor, not [0, 1]",
    "integrated_gradients(model, x, baseline=None)": "is a number, 'mean', 'blur' or a tensor, not None",
    "integrated_gradients(model, x, baseline=True)": "is a number, 'mean', 'blur' or a tensor, not True",
    "integrated_gradients(model, x, baseline={'input': x.numpy()})": "is a number, 'mean', 'blur' or a tensor, not",
    "expected_gradients(model, x, 3)": "the references of input 'input' must be (n, 3, 8, 8), not 3",
    "expected_gradients(model, x, None)": "the references of input 'input' must be (n, 3, 8, 8), not None",
    "expected_gradients(model, x, x, samples='a')": "samples must be a whole number of at least 1, not 'a'",
    "expected_gradients(model, x, x, seed=None)": "seed must be a whole number, not None",
    "occlusion(model, x, patch=4.0)": "the patch 4.0 does not fit input 'input' (2, 3, 8, 8)",
    "occlusion(model, x, patch='big')": "the patch 'big' does not fit input",
    "occlusion(model, x, stride='far')": "the stride 'far' does not fit input",
    "occlusion(model, x, stride=[1, None])": "the stride [1, None] does not fit input",
    "integrated_gradients(model, x, baseline={3: 0.0})": "inputs are named by strings, such as 'input', not by 3",
    "captum_attribution('Occlusion', model, x, strides={3: 4})": "no input '3'. There are: 'input'",
    "occlusion(model, x, patch={3: 4})": "inputs are named by strings, such as 'input', not by 3",
    "occlusion(model, x, batch_size=None)": "batch_size must be a whole number of at least 1, not None",
    "mc.kernels('conv1')": "kernels are those of a module, such as model.get_submodule('stem.0'), not of a str",
    "mc.kernels(model[0].weight)": "kernels are those of a module",
    "mc.figures.kernel_sheet(model[0])": "a sheet shows what kernels(layer) returns, not a Conv2d",
    "mc.figures.kernel_sheet(mc.kernels(model[0]), channels=3)": "output channels are chosen by their numbers, as in [0, 5], not by 3",
    "mc.figures.feature_sheet({'a': x})": "a sheet shows the maps of one layer (b c *grid), not a dict",
    "mc.figures.feature_sheet(x, most=2.5)": "most must be a whole number of at least 1, not 2.5",
    "mc.feature_maps(model, x, ['0'])": "a layer is a module path, a module or a Layer, not ['0']",
    "mc.activation_maximization(model, x, '0', 1, parameterization='wavelet')": "no parameterization 'wavelet'",
    "mc.activation_maximization(model, x, '0', 1, bounds=3)": "bounds are (low, high)",
    "mc.activation_maximization(model, x, '0', 'red')": "a channel is an int, not 'red'",
    "mc.deep_dream(model, x, '0', [1, 2])": "one channel",
    "mc.panel({'input': x.numpy()}, {'input': x[:, 0]})": "input 'input' is a ndarray, and images are tensors (b c h w)",
    "mc.compare({'input': iter(x)}, {'a': mc.Maps({'input': x[:, 0]})})": "which is empty after one pass: give a list",
    "mc.GradCAM(torch.nn.Conv2d, '0')": "a model is a torch.nn.Module, not a type",
    "mc.contribution(model.forward, x)": "a model is a torch.nn.Module, not a method",
    "mc.figures.saliency_figure({'input': x}, {'input': x})": "attributions are what gradient() and its kin return, not a dict",
    "mc.contribution(model, x, players=3)": "players are names of inputs, or groups of such, in a list or a dict, not 3",
    "mc.contribution(model, x, baseline='mea')": "no baseline 'mea'; did you mean 'mean'",
    "mc.metrics.road(model, x, x[:, 0], 1, order='first')": "order is 'most' or 'least' relevant first, not 'first'",
    "mc.metrics.deletion(model, x, x[:, 0], 1, steps=0.5)": "steps must be a whole number of at least 1, not 0.5",
    "captum_attribution(3, model, x)": "an algorithm is a name or class of captum.attr, or a function, not 3",
    "captum_attribution('Saliencey', model, x)": "no algorithm in captum.attr 'Saliencey'; did you mean 'Saliency'",
    "captum_attribution('Saliency', x, model)": "a model is a torch.nn.Module, not a Tensor",
    "captum_attribution('Saliency', model, x, wrt=3)": "inputs are named by a string",
    "captum_attribution('LayerGradCam', model, x, layer='9')": "no layer in Sequential '9'",
    "mc.Inputs(x).repeat(-1)": "repeat takes a number of copies, at least 1, not -1",
}
RUN = """
import sys
failed = []
for call in sys.stdin.read().splitlines():
    try:
        result = eval(call)
        if isinstance(result, mc.CAM):
            result(x)
        print(f"no error: {result!r}")
    except mc.MulticamError as error:
        print(str(error).replace(chr(10), " "))
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace(chr(10), " "))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    run = subprocess.run(
        [sys.executable, "-c", SETUP + RUN], input="\n".join(CALLS), capture_output=True, text=True, check=True
    )
    return dict(zip(CALLS, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_says_what_is_right(call: str, answers: dict[str, str]) -> None:
    assert CALLS[call] in answers[call]
