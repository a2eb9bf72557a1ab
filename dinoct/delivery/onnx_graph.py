"""An encoder as an ONNX graph: HU of any size in, class and patch tokens out."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from dinoct.delivery.encoder import Encoder, to_image
from dinoct.errors import ConfigError

if TYPE_CHECKING:
    from onnx_ir import Model

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE = 2**31 - 2**24  # bytes of weights that fit into one file: protobuf takes 2 GiB, the graph needs some of it


def require_onnx() -> None:
    """Raises ConfigError if a package of the extra is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"format=onnx needs {', '.join(missing)}: pip install 'dinoct[onnx]'")


class _Graph(nn.Module):
    """An encoder without the checks, which a graph cannot have."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.backbone, self.size, self.window = encoder.backbone, encoder.img_size, encoder.window

    def forward(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone(to_image(hu, size=self.size, window=self.window))


def write_onnx(path: Path, encoder: Encoder, metadata: dict[str, str]) -> None:
    """Write the graph to `path`, with `metadata` as its metadata_props.

    Input ``hu`` float32 ``[batch, 1, height, width]``; outputs ``cls`` ``[batch, D]`` and ``patches``
    ``[batch, P, D]``. Weights of more than 2 GB go to ``PATH.data``.
    """
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    torch_onnx = logging.getLogger("torch.onnx")
    level = torch_onnx.level
    torch_onnx.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making, about its own coming versions
            program = torch.onnx.export(
                _Graph(encoder).eval(),
                (torch.full((2, 1, 40, 56), -1000.0),),  # an example: no two sizes are the same, none is fixed
                input_names=["hu"],
                output_names=["cls", "patches"],
                dynamic_shapes={"hu": free},
                dynamo=True,
                verbose=False,
            )
    finally:
        torch_onnx.setLevel(level)
    _forget_origin(program.model)
    program.model.metadata_props.update(metadata)
    save_graph(program.model, path)


def save_graph(model: "Model", path: Path) -> None:
    """Write a graph to `path`; weights that are too many for one file go to ``PATH.data``."""
    import onnx_ir

    size = sum(weight.const_value.nbytes for weight in model.graph.initializers.values())
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > ONE_FILE else None)


def _forget_origin(model: "Model") -> None:
    """Take away where in which Python files each node was written: paths of the machine, most of the graph's text."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def run_onnx(path: Path, hu: np.ndarray) -> list[np.ndarray]:
    """Class and patch tokens of HU ``[B, 1, H, W]`` float32, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["cls", "patches"], {"hu": hu})
