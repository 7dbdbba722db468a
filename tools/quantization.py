"""Quantize an ONNX file to int8, and find the layers that its accuracy needs in float32.

The work is that of ONNX Runtime's quantizer, in its form QDQ. Weights are int8 for each output channel. They
use 7 bits, as sums of 8 bits overflow on processors without VNNI. Activations are uint8. Their ranges are
percentiles over calibration images. Attention logits, softmax, position terms and products of two activations
stay float32.
"""
from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from system.console import quiet

import numpy as np
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationDataReader, PercentileCalibrater
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

WEIGHTED = ('Conv', 'Gemm', 'MatMul')
FOLLOWERS = (                                       # whose results are int8 where their inputs are
    'Add', 'Relu', 'Sigmoid', 'Mul', 'MaxPool', 'Reshape', 'Transpose', 'Gather', 'Pad', 'Unsqueeze')
MOVING = ('Reshape', 'Transpose', 'Gather', 'Pad', 'Slice', 'Squeeze', 'Unsqueeze', 'Identity', 'Expand')
SCALING = ('Mul', 'Div')                            # by a constant
BINS = 2048                                         # of the histogram of an activation
PERCENTILE = 99.99                                  # of the values of an activation that its range holds


class Quantizer:
    """Writes a float32 ONNX file with some of its layers in int8.

    `layers` has the names of all that can be quantized: convolutions, and products with weights.
    Files for its work go to `folder`.
    """

    def __init__(self, path: str, folder: str) -> None:
        self.folder = folder
        self.prepared = os.path.join(folder, 'prepared.onnx')
        with quiet():                               # and fuse biases into convolutions
            quant_pre_process(path, self.prepared, skip_symbolic_shape=True)
        graph = onnx.load(self.prepared).graph
        self.nodes = {node.name: node for node in graph.node}
        self.constants = {value.name for value in graph.initializer}
        self.maker = {output: node for node in graph.node for output in node.output}
        in_float = self._attention_terms()
        self.layers = [name for name, node in self.nodes.items()
                       if name not in in_float and self._weighted(node)]
        # what only moves queries and keys moves int8: OpenVINO 2026.4 crashes where it moves float32
        self.followers = [name for name, node in self.nodes.items()
                          if node.op_type in FOLLOWERS and (name not in in_float or node.op_type in MOVING)]
        self.ranges: Any = None

    def calibrate(self, batches: Iterable[np.ndarray]) -> None:
        """Find the ranges of activations over batches of inputs."""
        nodes = [self.nodes[name] for name in (*self.layers, *self.followers)]
        calibrator = _Calibrator(
            self.prepared, [*WEIGHTED, *FOLLOWERS], os.path.join(self.folder, 'augmented.onnx'),
            symmetric=False, num_bins=BINS, percentile=PERCENTILE)
        calibrator.wanted = {value for node in nodes for value in (*node.input, *node.output)}
        calibrator.augment_graph()
        calibrator.create_inference_session()
        name = calibrator.infer_session.get_inputs()[0].name
        for images in batches:                      # each alone, as it keeps all activations of a call
            with quiet():
                calibrator.collect_data(_Reader([{name: images}]))
        with quiet():
            self.ranges = calibrator.compute_data()

    def write(self, path: str, layers: Collection[str], alone: bool = False) -> None:
        """Write a file where the `layers` are in int8, and what follows them too, unless `alone`."""
        chosen = [*layers, *([] if alone else self._followers_of(layers))]
        quantizer = QDQQuantizer(
            onnx.load(self.prepared), per_channel=True, reduce_range=True, weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8, tensors_range=self.ranges, nodes_to_quantize=chosen,
            nodes_to_exclude=[], op_types_to_quantize=[*WEIGHTED, *FOLLOWERS], extra_options={})
        with quiet():
            quantizer.quantize_model()
        quantizer.model.save_model_to_file(path)

    # ---- the graph

    def _weighted(self, node: Any) -> bool:
        """True for a layer with weights."""
        return node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in self.constants

    def _attention_terms(self) -> set[str]:
        """Return the names of all nodes between the projections of an attention layer and its softmax."""
        found: set[str] = set()
        waiting = [node for node in self.nodes.values() if node.op_type == 'Softmax']
        while waiting:
            node = waiting.pop()
            if node.name in found or self._weighted(node) and not self._is_position_term(node):
                continue
            found.add(node.name)
            waiting += [self.maker[name] for name in node.input if name in self.maker]
        return found

    def _is_position_term(self, node: Any) -> bool:
        """True for a product with weights of what another layer made, with nothing but moves between."""
        source = self.maker.get(node.input[0])
        while source is not None and self._moves(source):
            source = self.maker.get(source.input[0])
        return source is not None and self._weighted(source)

    def _moves(self, node: Any) -> bool:
        scales = node.op_type in SCALING and node.input[1] in self.constants
        return node.op_type in MOVING or scales

    def _followers_of(self, layers: Collection[str]) -> Iterator[str]:
        """Yield the nodes that work in int8 as all their inputs do; the nodes are in the order of work."""
        whole = set(layers)
        for name in self.followers:
            inputs = [value for value in self.nodes[name].input if value not in self.constants]
            if all(value in self.maker and self.maker[value].name in whole for value in inputs):
                whole.add(name)
                yield name


class _Calibrator(PercentileCalibrater):
    """A calibrator of the tensors `wanted` only: a mask, for one, may be infinite."""

    wanted: set[str]

    def select_tensors_to_calibrate(self, model: Any) -> tuple[set[str], dict[str, Any]]:
        found, types = super().select_tensors_to_calibrate(model)
        return found & self.wanted, types


class _Reader(CalibrationDataReader):
    """Inputs for a calibrator."""

    def __init__(self, inputs: Sequence[dict[str, np.ndarray]]) -> None:
        self.inputs = iter(inputs)

    def get_next(self) -> Any:
        return next(self.inputs, None)
